"""Ctrl-C while rows are tokenised, outputs that are there already, and surroundings that are not what they should be."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megadpo.errors import UserError
from megadpo.files import require_new_file
from megadpo.parallel import world
from megadpo.training.logprobs import _writing
from tests.helpers.models import hh_rows, save_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and rows that take several processes much longer than any test here waits."""
    directory = tmp_path_factory.mktemp("files")
    save_model(directory / "model", "llama", num_hidden_layers=1)
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hh_rows(400)) * 300)
    return directory


def members(group: int) -> list[int]:
    """The processes of a process group that have not ended."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


@pytest.mark.alone
@pytest.mark.parametrize(
    "delay", [3.0, *(pytest.param(seconds, marks=pytest.mark.exhaustive) for seconds in (0.5, 1, 2, 4, 6, 9, 12, 15))]
)
@pytest.mark.slow
def test_one_interrupt_ends_the_tokenising_workers_in_one_line(files: Path, tmp_path: Path, delay: float) -> None:
    """Case 31: the group gets one SIGINT, this long after the first worker is there (the first ones: while they start)."""
    command = [sys.executable, "-m", "megadpo", "train", str(files / "run.yaml")]
    (files / "run.yaml").write_text(
        json.dumps(
            {
                "model": {"path": str(files / "model")},
                "data": {"train": str(files / "rows.jsonl"), "cache_dir": str(tmp_path / "cache"), "num_workers": 3},
                "output_dir": str(tmp_path / "run"),
            }
        )
    )
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and len(members(process.pid)) < 3:
        time.sleep(0.02)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    sent = time.monotonic()
    try:
        _, said = process.communicate(timeout=60)
        took = time.monotonic() - sent
    finally:
        deadline = time.monotonic() + 5  # Python's tracker of shared resources ends when it hears nothing more
        while (left_over := members(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        for member in left_over:
            os.kill(member, signal.SIGKILL)
    assert process.returncode == 130, said
    *earlier, last = [line for line in said.splitlines() if line]
    assert all(line.startswith("megadpo: ") and "interrupted" not in line for line in earlier), said  # what was going on
    assert last.startswith(f"megadpo: interrupted while {files / 'rows.jsonl'} was tokenised"), said
    assert "nothing was kept" in last and "the same command goes on there" in last
    # 2 s, and as many times as long as there are processes to each core: `alone` keeps other tests away, not other programs.
    assert left_over == [] and took < 2 * max(1, os.getloadavg()[0] / len(os.sched_getaffinity(0))), took
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert left == [] and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "RANK is set to '0' but WORLD_SIZE is not set; unset both to train alone"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is set to '4' but RANK is not set"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one' and WORLD_SIZE is '2'; give a rank below"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is '2' and WORLD_SIZE is '2'; give a rank below"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', not a number"),
    ],
)
def test_half_a_rank_is_one_sentence(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for ask in (world.rank, world.world_size):
        with pytest.raises(UserError, match=message):
            ask()


def test_half_a_rank_is_one_sentence_of_the_command(files: Path, tmp_path: Path) -> None:
    environment = os.environ | {"RANK": "one", "WORLD_SIZE": "2", "TMPDIR": str(tmp_path)}
    (files / "empty.yaml").write_text("{}")
    settings = ["model.path=nowhere", "data.train=nowhere", "output_dir=nowhere"]
    command = [sys.executable, "-m", "megadpo", "train", str(files / "empty.yaml"), *settings]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 2 and "RANK is 'one'" in run.stderr and len(run.stderr.splitlines()) == 1, run.stderr


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (print, r"callbacks is a builtin_function_or_method; give megadpo.Callbacks\(on_step_end=…"),
        ({"on_step_end": print}, "callbacks is a dict; give megadpo.Callbacks"),
        ("saved", r"callbacks.on_save is a str, not a function"),
    ],
)
def test_callbacks_that_cannot_be_called_are_one_sentence(callbacks: Any, message: str) -> None:
    import megadpo

    if isinstance(callbacks, str):
        callbacks = megadpo.Callbacks(on_save=callbacks)  # type: ignore[arg-type]
    settings = {"model": {"path": "nowhere"}, "data": {"train": "nowhere"}, "output_dir": "nowhere"}
    with pytest.raises(UserError, match=message):
        megadpo.train(settings, callbacks)


def written(path: Path, force: bool = False) -> None:
    with _writing(require_new_file(path, "--out", force)) as lines:
        lines.write("new\n")


def test_a_file_is_replaced_only_by_force_and_whole(tmp_path: Path) -> None:
    out = tmp_path / "some" / "out.jsonl"
    written(out)
    with pytest.raises(UserError, match=r"--out: .*out.jsonl exists already; choose another file, or add --force"):
        written(out)
    with pytest.raises(ZeroDivisionError), _writing(require_new_file(out, "--out", True)) as lines:
        lines.write("half")
        _ = 1 / 0
    assert out.read_text() == "new\n" and [path.name for path in out.parent.iterdir()] == ["out.jsonl"]
    out.write_text("old\n")
    written(out, force=True)
    assert out.read_text() == "new\n"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    written(link)
    with pytest.raises(UserError, match="exists already"):
        written(link)
    written(link, force=True)
    assert link.is_symlink() and target.read_text() == "new\n"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match=r"--out: .*loop cannot be written"):
        written(tmp_path / "loop")


def test_a_device_and_a_pipe_stay_what_they_are(tmp_path: Path) -> None:
    null = Path("/dev/null")
    written(null)
    assert stat.S_ISCHR(null.stat().st_mode)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    written(pipe)
    assert reader.communicate(timeout=20)[0] == "new\n" and stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_full_disk_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"--out: /dev/full cannot be written: No space left on device"):
        written(Path("/dev/full"))


def test_the_command_refuses_what_is_there_before_it_computes(tmp_path: Path) -> None:
    from megadpo.cli import main

    (tmp_path / "out").write_text("precious")
    command = ["logprobs", "--model", "no", "--data", "no", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="exists already; choose another file, or add --force"):
        main(command)
    with pytest.raises(UserError, match="there is no directory no"):
        main([*command, "--force"])
    assert (tmp_path / "out").read_text() == "precious"
