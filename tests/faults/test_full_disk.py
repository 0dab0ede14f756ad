"""A disk that fills, or cannot be written: one sentence with the path; nothing half written keeps a final name; and when
there is room again the run goes on to the bits of a run that always had room.

The disk is a small tmpfs, which only root can mount: elsewhere these tests are skipped.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megadpo.checkpoint.sharded import open_checkpoint, step_directories
from megadpo.errors import UserError
from megadpo.metrics.sinks import JsonlSink, TensorBoardSink
from tests.helpers.launched import finish
from tests.helpers.runs import assert_same_weights, log_probs, read_metrics, run_settings, save_files, train_run, weights_in
from tests.helpers.worlds import run_world

MIB = 1 << 20
DISK_BYTES = 8 * MIB
NUM_FAST, NUM_ALL = 4, 20


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    return save_files(directory, "qwen3", 24, num_hidden_layers=2, hidden_size=32, intermediate_size=48)


@contextlib.contextmanager
def mounted(directory: Path, num_bytes: int = DISK_BYTES) -> Iterator[Path]:
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes},mode=0700", "megadpo-test", str(directory)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    with mounted(tmp_path / "disk") as directory:
        yield directory


def leave(disk: Path, num_bytes: int) -> Path:
    """Fill the disk but for so many bytes, with a file that is returned."""
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free - num_bytes))
    return filler


def fill(disk: Path) -> Path:
    """Fill the disk to the last byte that it gives."""
    filler = leave(disk, 4096)
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


def settings_of(files: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    sections = {
        "train": {"steps": 4, "pairs_per_step": 4, "tokens_per_micro_batch": 256, "warmup_steps": 0},
        "checkpoint": {"every": 1, "keep": 9},
    }
    for section, values in changes.items():
        sections[section] = sections.get(section, {}) | values
    return run_settings(files, output_dir, **sections)


def _heard(settings: dict[str, Any]) -> tuple[str | None, str]:
    """The sentence that ends a run, if one does; and what it says on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            train_run(settings)
        except UserError as error:
            return str(error), said.getvalue()
    return None, said.getvalue()


def check_what_is_left(output_dir: Path) -> None:
    """Nothing half written: no staging directory, every checkpoint intact, every line of metrics whole."""
    assert not list(output_dir.rglob("*.tmp")), list(output_dir.rglob("*.tmp"))
    for directory in step_directories(output_dir / "checkpoints"):
        open_checkpoint(directory).check_files()
    if (output_dir / "metrics.jsonl").exists():
        for line in (output_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True):
            assert line.endswith(b"\n") and json.loads(line)["step"] > 0
    if (output_dir / "hf").exists():
        assert weights_in(output_dir / "hf")


def _fill_and_go_on(runs: list[tuple[dict[str, Any], str, int]]) -> list[tuple[str | None, str]]:
    """Each run on its disk with so many bytes left; then, with room again, to its end."""
    heard = []
    for settings, disk, num_bytes in runs:
        output_dir, filler = Path(settings["output_dir"]), leave(Path(disk), num_bytes)
        heard.append(_heard(settings))
        check_what_is_left(output_dir)
        filler.unlink()
        assert _heard(settings)[0] is None
    return heard


def filled_disks(numbers: range, files: Path, tmp_path: Path) -> None:
    whole = settings_of(files, tmp_path / "whole")
    run_world(1, train_run, whole)
    with contextlib.ExitStack() as stack:
        runs = []
        for number in numbers:
            disk = stack.enter_context(mounted(tmp_path / f"disk{number}"))
            num_bytes = (number * 2 + 1) * 3 * MIB // (2 * NUM_ALL)
            changes = {"checkpoint": {"asynchronous": number % 2 == 0}, "logging": {"tensorboard": number % 4 == 1}}
            runs.append((settings_of(files, disk / "run", **changes), str(disk), num_bytes))
        heard = run_world(1, _fill_and_go_on, runs)[0]
        for (settings, disk, num_bytes), (refused, said) in zip(runs, heard, strict=True):
            assert "Traceback" not in said
            assert refused is not None, num_bytes
            assert disk in refused and "No space left on device" in refused and "\n" not in refused, refused
            assert read_metrics(Path(settings["output_dir"])) == read_metrics(tmp_path / "whole")
            assert_same_weights(Path(settings["output_dir"]), tmp_path / "whole")


@pytest.mark.slow
def test_a_disk_that_fills_is_one_sentence_and_the_run_goes_on_when_there_is_room(files, tmp_path):
    filled_disks(range(0, NUM_ALL, NUM_ALL // NUM_FAST), files, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_twenty_disks_that_fill_at_different_places(files, tmp_path):
    filled_disks(range(NUM_ALL), files, tmp_path)


def _two_ranks(settings: dict[str, Any], disk: str, num_bytes: int) -> tuple[str | None, str]:
    import torch.distributed as dist

    if os.environ["RANK"] == "0":
        leave(Path(disk), num_bytes)
    heard = _heard(settings)
    assert not dist.is_initialized()
    return heard


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [True, False])
def test_all_ranks_end_with_the_same_sentence(files, disk, asynchronous):
    changes = {"parallel": {"tensor": 2}, "checkpoint": {"asynchronous": asynchronous}}
    settings = settings_of(files, disk / "run", **changes)
    first, second = run_world(2, _two_ranks, settings, str(disk), MIB)
    assert first[0] is not None and first[0] == second[0] and "No space left" in first[0]
    check_what_is_left(disk / "run")
    assert [path.name for path in step_directories(disk / "run" / "checkpoints")] == ["step_00000001"]


def _one_after_the_other(files: Path, disk: Path) -> dict[str, tuple[str | None, str]]:
    """Runs of two steps, each with something else that does not fit on the disk."""
    heard = {}
    short, never = {"train": {"steps": 2}}, {"checkpoint": {"every": 0}}

    def attempt(name: str, num_bytes: int, settings: dict[str, Any]) -> None:
        filler = leave(disk, num_bytes) if num_bytes else fill(disk)
        heard[name] = _heard(settings)
        filler.unlink()
        check_what_is_left(Path(settings["output_dir"]))

    attempt("skip", 500_000, settings_of(files, disk / "skip", **short, checkpoint={"every": 1, "on_failed_write": "skip"}))
    exported = settings_of(files, disk / "export", **short, **never)
    assert _heard(exported)[0] is None
    before = {path.name: path.read_bytes() for path in (disk / "export" / "hf").iterdir()}
    attempt("export", 100_000, exported)
    assert {path.name: path.read_bytes() for path in (disk / "export" / "hf").iterdir()} == before, "the earlier one stays"
    attempt("cache", 0, settings_of(files, disk.parent / "cache", **short, **never, data={"cache_dir": str(disk / "cache")}))
    with_cache = {**short, **never, "data": {"cache_dir": str(disk / "made")}}
    assert _heard(settings_of(files, disk.parent / "makes the token cache", **with_cache))[0] is None
    precomputed = {"reference": {"mode": "precomputed"}}
    attempt("reference cache", 0, settings_of(files, disk.parent / "logps", **with_cache, **precomputed))
    attempt("configuration", 0, settings_of(files, disk / "config", **short, **never))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    heard["read-only"] = _heard(settings_of(files, disk / "ro", **short))
    return heard


@pytest.mark.slow
def test_what_can_be_done_without_is_and_all_else_is_named(files, disk):
    heard = run_world(1, _one_after_the_other, files, disk)[0]
    assert all("Traceback" not in said for _, said in heard.values())
    refused = {name: sentence for name, (sentence, _) in heard.items() if sentence is not None}
    assert refused.keys() == {"export", "cache", "configuration", "read-only"}, refused
    assert all(str(disk) in sentence and "\n" not in sentence for sentence in refused.values())
    for name in ("export", "cache", "configuration"):
        assert "No space left on device" in refused[name], refused[name]
    assert "the trained model is not exported" in refused["export"] and "data.cache_dir" in refused["cache"]
    assert "output_dir" in refused["configuration"]
    assert "output_dir" in refused["read-only"] and "Read-only file system" in refused["read-only"]
    assert heard["skip"][1].count("going on without it") == 2 and "No space left on device" in heard["skip"][1]
    assert "reference cache" in heard["reference cache"][1] and "No space left on device" in heard["reference cache"][1]


def test_a_line_of_metrics_that_does_not_fit_is_named_and_no_part_of_it_stays(disk):
    sink, number = JsonlSink(disk / "metrics.jsonl"), 0
    sink.write({"step": 0})
    fill(disk)
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: No space left on device"):
        for number in range(1, 1000):
            sink.write({"step": number, **{f"metric {i}": 0.5 for i in range(20)}})
    (disk / "filler").unlink()
    sink.write({"step": number})
    sink.close()
    steps = [json.loads(line)["step"] for line in (disk / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(number + 1))


def test_tensorboard_on_a_full_disk_is_one_sentence_without_a_thread_s_traceback(disk, capfd):
    sink = TensorBoardSink(disk / "tensorboard")
    fill(disk)
    with pytest.raises(UserError, match=r"tensorboard cannot be written: No space left on device"):
        for number in range(10_000):
            sink.write({"step": number, **{f"metric {i}": 0.5 for i in range(50)}})
    with contextlib.suppress(UserError):
        sink.close()
    assert "Traceback" not in capfd.readouterr().err


def test_log_probs_on_a_full_disk_are_one_sentence_and_no_file(files, disk):
    fill(disk)
    with pytest.raises(AssertionError, match=r"UserError: --out: .*No space left on device"):
        out = disk / "logprobs.jsonl"
        run_world(1, log_probs, files / "model", files / "train.jsonl", out, {}, True, files / "cache")
    assert [path.name for path in disk.iterdir()] == ["filler"]


@pytest.mark.slow
def test_the_command_ends_with_a_status_and_one_sentence(files, disk, tmp_path):
    (disk / "run").mkdir()
    (tmp_path / "run").symlink_to(disk / "run")  # so that what the launcher says, beside it, has room
    leave(disk, MIB)
    status, output = finish(settings_of(files, tmp_path / "run"), 2)
    assert status == 2 and "Traceback" not in output, output
    assert len([line for line in output.splitlines() if "megadpo: error: no checkpoint of step" in line]) == 1, output
    check_what_is_left(disk / "run")
