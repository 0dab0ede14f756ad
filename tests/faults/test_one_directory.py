"""One run, one directory (case 34): a second run is refused with one sentence, a dead one's lock is taken over, leftovers
go, links are followed or refused."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megadpo.checkpoint.staging import clean_up, publish, remove, staging
from megadpo.errors import UserError
from megadpo.training import run_lock
from megadpo.training.output_dir import remove_leftovers
from megadpo.training.run_lock import Owner, owning
from tests.helpers.launched import finish, start
from tests.helpers.runs import assert_same_weights, run_settings, save_files
from tests.helpers.worlds import forked


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_files(tmp_path_factory.mktemp("files"), "llama", 40, num_hidden_layers=2)


@pytest.mark.parametrize("same", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_of_two_runs_started_at_once_in_one_directory_the_second_is_refused(files: Path, tmp_path: Path, same: bool) -> None:
    """Case 34, with equal and with different settings."""
    ours = run_settings(files, tmp_path / "run", train={"steps": 3})
    other = ours if same else run_settings(files, tmp_path / "run", train={"steps": 3, "seed": 7})
    runs = [start(ours, 2), start(other, 1)]
    statuses = [run.wait() for run in runs]
    assert sorted(statuses) == [0, 2], [run.output() for run in runs]
    refused = runs[statuses.index(2)].output()
    (line,) = [line for line in refused.splitlines() if "error" in line]
    where = f"output_dir: {tmp_path / 'run'} is in use by another run ({socket.gethostname()}, process "
    assert f"megadpo: error: {where}" in line, line
    assert "since 20" in line and "wait until that has ended, end it, or choose another directory" in line
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "run" / "run.lock").exists()


def _hold(directory: str, seconds: float) -> None:
    with owning(Path(directory)):
        (Path(directory) / "held").touch()
        time.sleep(seconds)


def test_the_lock_of_a_killed_process_is_taken_over_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    holder = forked(_hold, str(tmp_path), 60.0)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    sentence = rf"is in use by another run \({socket.gethostname()}, process {holder.pid}, since"
    with pytest.raises(UserError, match=sentence), owning(tmp_path):
        pass
    holder.kill()
    holder.join()
    with owning(tmp_path) as lock:
        assert json.loads((tmp_path / "run.lock").read_text())["process"] == os.getpid() == lock.owner.process
    assert not (tmp_path / "run.lock").exists()


def test_a_process_number_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    me = Owner.this_process()
    reused = Owner(me.host, me.process, me.began - 1, me.boot, me.since)
    (tmp_path / "run.lock").write_text(json.dumps(vars(reused)))
    with owning(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", '{"host": "a"}', "null", "\x00" * 40])
def test_a_lock_whose_writer_died_over_it_is_taken_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.lock").write_text(text)
    with owning(tmp_path):
        pass


@pytest.mark.parametrize("seconds", [0, run_lock.SECONDS_UNTIL_STALE + 60])
def test_on_a_shared_file_system_a_lock_of_another_machine_counts_as_long_as_it_is_touched(
    tmp_path: Path, seconds: float
) -> None:
    (tmp_path / "run.lock").write_text(
        json.dumps(vars(Owner("node17", 4711, 1, "another boot", "2026-01-01T00:00:00+00:00")))
    )
    os.utime(tmp_path / "run.lock", (time.time() - seconds,) * 2)
    if seconds:
        with owning(tmp_path):
            pass
        return
    with (
        pytest.raises(UserError, match=r"\(node17, process 4711, since 2026.*; if node17 is no longer there, the directory"),
        owning(tmp_path),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_the_owner_touches_its_lock_and_notices_when_it_has_been_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "SECONDS_BETWEEN_TOUCHES", 0.02)
    with owning(tmp_path) as lock:
        os.utime(tmp_path / "run.lock", (0, 0))
        deadline = time.monotonic() + 20
        while (tmp_path / "run.lock").stat().st_mtime < 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        lock.check()
        other = Owner("node17", 4711, 1, "another boot", "now")
        (tmp_path / "theirs").write_text(json.dumps(vars(other)))
        (tmp_path / "theirs").replace(tmp_path / "run.lock")  # whole, as a run that takes a lock over does it
        while lock.taken_by is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(UserError, match=r"was taken over by another run \(node17, process 4711, since now\)"):
            lock.check()
    assert (tmp_path / "run.lock").exists(), "it is the other's"


def _take_in_turns(directory: str, number: int) -> None:
    import random

    for _ in range(40):
        try:
            with owning(Path(directory) / "run"):
                path = Path(directory) / "inside"
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL)  # fails where somebody else is inside, too
                os.close(descriptor)
                time.sleep(0.001)
                path.unlink()
        except UserError:
            time.sleep(random.random() / 500)
    (Path(directory) / f"well-{number}").touch()


def test_no_two_of_many_processes_that_want_it_have_it_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    processes = [forked(_take_in_turns, str(tmp_path), number) for number in range(4)]
    for process in processes:
        process.join()
    assert len(list(tmp_path.glob("well-*"))) == 4


def test_a_refused_run_leaves_no_directory_behind_and_no_thread(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no"), owning(tmp_path / "a" / "b"):
        raise UserError("no")
    assert list(tmp_path.iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("megadpo")]


def test_what_a_killed_run_has_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    leftovers = ["step_00000002.tmp", "step_00000001.deleted", "step_00000003.old", "step_00000004"]
    for name in [*leftovers, "step_00000003", "aside-1/step_00000009", "mine.old"]:
        (checkpoints / name / "huggingface").mkdir(parents=True)
    for name in ("step_00000003", "aside-1/step_00000009"):
        (checkpoints / name / "checkpoint.json").touch()
    for name in ("hf.tmp", "hf.old", "notes.tmp", "config.yaml.77.tmp", "metrics.jsonl.5.tmp", "own.tmp"):
        (tmp_path / name).mkdir() if name.startswith(("hf", "notes")) else (tmp_path / name).touch()
    (tmp_path / "hf.old" / "config.json").touch()
    removed = [path.name for path in remove_leftovers(tmp_path)]
    assert sorted(removed) == sorted([*leftovers, "hf.tmp", "config.yaml.77.tmp", "metrics.jsonl.5.tmp"])
    assert sorted(path.name for path in checkpoints.iterdir()) == ["aside-1", "mine.old", "step_00000003"]
    assert (tmp_path / "hf" / "config.json").exists(), "what was about to be replaced is back"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "hf", "notes.tmp", "own.tmp"]


def test_a_directory_goes_by_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "step_00000001").mkdir()
    (tmp_path / "step_00000001" / "checkpoint.json").touch()

    def refuse(path: Path) -> None:
        raise OSError("killed here")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", refuse)
        with pytest.raises(OSError, match="killed here"):
            remove(tmp_path / "step_00000001")
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001.deleted"]
    assert clean_up(tmp_path / "step_00000001") and list(tmp_path.iterdir()) == []


def test_a_linked_directory_is_followed_when_it_is_replaced_and_only_the_link_is_removed(tmp_path: Path) -> None:
    (tmp_path / "disk" / "moved").mkdir(parents=True)
    link = tmp_path / "hf"
    link.symlink_to(tmp_path / "disk" / "moved")
    staging(link).mkdir()
    (staging(link) / "new").touch()
    publish(link)
    assert link.is_symlink() and [path.name for path in link.iterdir()] == ["new"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["moved"]
    remove(link)
    assert not link.exists() and (tmp_path / "disk" / "moved" / "new").exists()


@pytest.mark.slow
def test_a_run_whose_model_was_moved_and_linked_goes_on_into_the_link(files: Path, tmp_path: Path) -> None:
    def of(steps: int) -> dict[str, Any]:
        return run_settings(files, tmp_path / "run", train={"steps": steps, "schedule": "constant"})

    assert finish(of(2), 1)[0] == 0
    (tmp_path / "run" / "hf").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "hf").symlink_to(tmp_path / "elsewhere")
    status, output = finish(of(3), 1)
    assert status == 0 and (tmp_path / "run" / "hf").is_symlink(), output
    assert_same_weights(tmp_path / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "elsewhere")
    status, output = finish(of(4), 1)
    assert status == 2 and output.splitlines()[-1].startswith("megadpo: error: "), output
    assert output.count("megadpo: error: ") == 1 and "Traceback" not in output
    assert "hf is a link to" in output and "where there is no directory; make it, or remove the link" in output
