"""Runs of older code, killed after a checkpoint, go on under this code: tests/fixtures/README.md says how they were made."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.make_old_runs import digest_of, machine
from tests.helpers.runs import train_run
from tests.helpers.worlds import run_world

pytestmark = pytest.mark.slow

OLD_RUNS = Path(__file__).parents[1] / "fixtures" / "old_runs"
NAMES = sorted(path.parent.name for path in OLD_RUNS.glob("*/expected.json"))


def _resumed(directory: Path, settings: dict[str, Any]) -> tuple[list[dict[str, float]], dict[str, str]]:
    """The metrics of the whole run, in the directory that its relative paths start from; and the rank's machine."""
    os.chdir(directory)
    return train_run(settings), machine()


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_older_code_goes_on_from_its_checkpoint(name, tmp_path):
    """To the metrics and weights that the older code came to: bit for bit where the processor is the same."""
    expected = json.loads((OLD_RUNS / name / "expected.json").read_text())
    if expected["settings"].get("parallel", {}).get("engine") == "deepspeed":
        pytest.importorskip("deepspeed")
    shutil.copytree(OLD_RUNS / "material", tmp_path, dirs_exist_ok=True)
    shutil.copytree(OLD_RUNS / name, tmp_path / "run", ignore=shutil.ignore_patterns("expected.json"))
    metrics, here = run_world(expected["num_processes"], _resumed, tmp_path, expected["settings"])[0]
    assert [record["step"] for record in metrics] == [1, 2, 3, 4]
    # What this code measures beside that is its own.
    metrics = [{name: record[name] for name in old} for record, old in zip(metrics, expected["metrics"], strict=True)]
    if here == expected["machine"]:
        assert metrics == expected["metrics"]
        assert digest_of(tmp_path / "run" / "hf") == expected["weights"]
    else:
        for ours, theirs in zip(metrics, expected["metrics"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)


def test_old_runs_of_both_engines_are_there_and_their_checkpoints_are_not_the_end():
    assert len(NAMES) >= 5
    for name in NAMES:
        expected = json.loads((OLD_RUNS / name / "expected.json").read_text())
        (step,) = (OLD_RUNS / name / "checkpoints").iterdir()
        assert int(step.name[5:]) < len(expected["metrics"]) and expected["commit"] == "b590d02"
    engines = {name.partition("-")[0] for name in NAMES}
    assert engines == {"megatron", "deepspeed"}
