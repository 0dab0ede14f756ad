"""A rank that hangs is named within `train.hang_timeout`, with everybody's stacks, and the run ends; what only takes long is
no hang."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.launched import Moment, finish
from tests.helpers.runs import run_settings, save_files

pytestmark = pytest.mark.slow

TIMEOUT = 4.0
STEP = "megadpo.training.trainer:training_step"
LONG = {
    "starting": "megadpo.training.reference:build_references",
    "compiling in the first step": STEP,
    "evaluating": "megadpo.training.held_out:evaluation",
    "saving": "megadpo.training.saving:write_shard_file",
    "exporting": "megadpo.training.export_files:write_export_files",
}
"""What may take as long as it takes."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_files(tmp_path_factory.mktemp("files"), "llama", 40, num_hidden_layers=2)


def settings(files: Path, output_dir: Path, steps: int = 10**6) -> dict[str, Any]:
    held_out = {"eval": str(files / "eval.jsonl")}
    return run_settings(files, output_dir, train={"steps": steps, "hang_timeout": TIMEOUT}, data=held_out)


def assert_named(files: Path, output_dir: Path, moment: Moment, sentence: str, where: str) -> None:
    status, output = finish(settings(files, output_dir), 2, moment)
    assert status == 1, output
    told = [line for line in output.splitlines() if line.startswith("megadpo: hang: ")]
    assert len(told) == 1, output
    said = told[0]
    assert f"rank {moment.rank} (" in said and sentence in said and "rank " not in said.partition("process")[2], said
    stacks = {path.name: path.read_text() for path in (output_dir / "stacks").iterdir()}
    assert stacks.keys() == {"rank_00000.txt", "rank_00001.txt"}
    hung, other = (stacks[f"rank_{rank:05d}.txt"] for rank in (moment.rank, 1 - moment.rank))
    assert where in hung and "in training_step" in other, "the main thread of each is there"
    mine = [p.pid for p in psutil.process_iter(["status"]) if p.info["status"] == psutil.STATUS_STOPPED]
    assert not any(_descends(pid, os.getpid()) for pid in mine), "no stopped process is left that could train on"


def _descends(process: int, ancestor: int) -> bool:
    try:
        return any(parent.pid == ancestor for parent in psutil.Process(process).parents())
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.exhaustive)])
def test_a_rank_that_is_stopped_is_named_and_ended(files: Path, tmp_path: Path, rank: int) -> None:
    moment = Moment(STEP, 3, rank, number=signal.SIGSTOP, after=0.01)
    assert_named(files, tmp_path / "run", moment, "gave no sign of life for ", "in training_loop")


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stuck_while_the_others_wait_for_it_is_named(files: Path, tmp_path: Path, rank: int) -> None:
    moment = Moment("megadpo.training.step:evaluate_micro_batch", 5, rank, sleep=600)
    assert_named(files, tmp_path / "run", moment, "did not end its step for ", "_happen")


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [0, 1])
def test_what_only_takes_long_is_no_hang(files: Path, tmp_path: Path, rank: int) -> None:
    functions = [function for name, function in LONG.items() if rank == 0 or name != "exporting"]
    moments = [Moment(function, 1, rank, sleep=2 * TIMEOUT) for function in functions]
    status, output = finish(settings(files, tmp_path / "run", steps=3), 2, *moments)
    assert status == 0 and not (tmp_path / "run" / "stacks").exists(), output


@pytest.mark.exhaustive
def test_a_run_that_is_suspended_as_a_whole_goes_on_afterwards(files: Path, tmp_path: Path) -> None:
    from tests.helpers.launched import start

    run = start(settings(files, tmp_path / "run", steps=40), 2)
    metrics = tmp_path / "run" / "metrics.jsonl"
    run.wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 1)
    ranks = psutil.Process(run.process).children()
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in ranks:
            process.send_signal(number)
        if number == signal.SIGSTOP:
            time.sleep(TIMEOUT + 2)
    assert run.wait() == 0, run.output()
