"""SIGKILL at random moments and at every file operation of a save, a rename, a clean-up and an export: the run that goes on
is, bit for bit, the one that was left alone, and nothing of the killed one stays.

A kill at a file operation comes right before it: before a file is opened to be written, a directory is made, something is
renamed or removed (`launched.OPERATIONS`); which of them, the number says.
"""

from __future__ import annotations

import os
import random
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launched import Moment, finish
from tests.helpers.runs import assert_same_weights, read_metrics, run_settings, save_files

pytestmark = pytest.mark.slow

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor": (2, {"tensor": 2}),
    "pipeline": (2, {"pipeline": 2}),
    "data": (2, {}),
    "deepspeed": (2, {"engine": "deepspeed", "zero_stage": 2}),
    "deepspeed tensor": (2, {"engine": "deepspeed", "zero_stage": 1, "tensor": 2}),
}
FAST = {
    "in the first save": ("pipeline", Moment(operation="open .*step_00000001.tmp/checkpoint.json")),
    "another rank in a save": ("pipeline", Moment("megadpo.training.saving:write_shard_file", 2, rank=1)),
    "in the removal of the oldest checkpoint": ("data", Moment(operation="os.remove .*step_00000001.deleted/", count=3)),
    "before the last save removes the one before": ("data", Moment(operation="os.rename checkpoints/step_00000003$")),
    "before the export gets its name": ("deepspeed tensor", Moment(operation="os.rename hf.tmp")),
}
NUM_OPERATIONS = 95
"""As many file operations rank 0 does in a run."""
RANDOM = random.Random(14)
RANDOMLY = [
    (layout, moment)
    for layout in LAYOUTS
    for moment in [
        *(Moment(count=RANDOM.randint(1, NUM_OPERATIONS)) for _ in range(11)),
        *(
            Moment(f"megadpo.training.{name}", count, rank=1, after=RANDOM.choice((0.0, 0.002, 0.01)))
            for name, count in (
                ("saving:write_shard_file", 1),
                ("saving:write_shard_file", 3),
                ("run_state:export_policy", 1),
            )
        ),
        *(
            Moment("megadpo.training.trainer:training_step", 1, RANDOM.randrange(2), after=RANDOM.uniform(0.05, 1.5))
            for _ in range(6)
        ),
    ]
]
"""100 of them."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_files(tmp_path_factory.mktemp("files"), "llama", 40, num_hidden_layers=2)


def settings(files: Path, output_dir: Path, parallel: dict[str, Any]) -> dict[str, Any]:
    """Four steps, all of them saved, the newest one kept: so each save but the first removes the one before."""
    return run_settings(files, output_dir, parallel=parallel, train={"steps": 4}, checkpoint={"every": 1, "keep": 1})


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run in each layout that nobody disturbs, made when it is first asked for."""
    root = tmp_path_factory.mktemp("whole")

    class Runs(dict[str, Path]):
        def __missing__(self, layout: str) -> Path:
            num_processes, parallel = LAYOUTS[layout]
            status, output = finish(settings(files, root / layout, parallel), num_processes)
            assert status == 0, output
            self[layout] = root / layout
            return self[layout]

    return Runs()


def everything_in(output_dir: Path) -> list[str]:
    """All files and directories, but for the metrics of a run that was killed before its first save: they are kept."""
    paths = [path for path in output_dir.rglob("*") if not re.fullmatch(r"metrics\.\d+\.jsonl", path.name)]
    return sorted(os.fspath(path.relative_to(output_dir)) for path in paths)


def killed_and_gone_on(files: Path, output_dir: Path, whole: Path, layout: str, moment: Moment) -> bool:
    """Whether the kill hit the run; the run goes on, however often it is asked to, to what `whole` is."""
    num_processes, parallel = LAYOUTS[layout]
    status, output = finish(settings(files, output_dir, parallel), num_processes, moment)
    assert status in (0, 1), output
    if status == 1:
        assert f"rank {moment.rank} was killed by SIGKILL" in output, output
        again, output = finish(settings(files, output_dir, parallel), num_processes)
        assert again == 0, output
    assert read_metrics(output_dir) == read_metrics(whole)
    assert_same_weights(output_dir, whole)
    assert everything_in(output_dir) == everything_in(whole), "nothing of the killed run is left"
    return status == 1


@pytest.mark.parametrize("name", FAST)
def test_a_run_that_is_killed_goes_on_bit_for_bit(files: Path, whole: dict[str, Path], tmp_path: Path, name: str) -> None:
    layout, moment = FAST[name]
    if "deepspeed" in layout:
        pytest.importorskip("deepspeed", reason="DeepSpeed is an extra of its own")
    assert killed_and_gone_on(files, tmp_path / "run", whole[layout], layout, moment), "the run was hit"


@pytest.mark.exhaustive
@pytest.mark.parametrize(("layout", "moment"), RANDOMLY, ids=lambda value: value if isinstance(value, str) else repr(value))
def test_so_does_one_that_is_killed_anywhere(
    files: Path, whole: dict[str, Path], tmp_path: Path, layout: str, moment: Moment
) -> None:
    if "deepspeed" in layout:
        pytest.importorskip("deepspeed", reason="DeepSpeed is an extra of its own")
    killed_and_gone_on(files, tmp_path / "run", whole[layout], layout, moment)


@pytest.mark.exhaustive
def test_a_run_killed_over_and_over_again_goes_on_every_time(files: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    num_processes, parallel = LAYOUTS["data"]
    for operation in (2, 9, 25):
        status, output = finish(settings(files, tmp_path / "run", parallel), num_processes, Moment(count=operation))
        assert status == 1, output
    assert finish(settings(files, tmp_path / "run", parallel), num_processes)[0] == 0
    assert read_metrics(tmp_path / "run") == read_metrics(whole["data"])
    assert_same_weights(tmp_path / "run", whole["data"])
    assert everything_in(tmp_path / "run") == everything_in(whole["data"])
