"""The run in every tracker's own library, offline: metrics, configuration, the same run when it is resumed, no secret."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import trackers
from tests.helpers.runs import run_settings, save_files
from tests.helpers.worlds import run_world

NAMES = ["wandb", "mlflow", "trackio", "swanlab"]
CANARY = "canary-9d21f0aa55"
IN_A_URL = f"https://me:{CANARY}@tracking.example/x?token={CANARY}"


def _train_and_read(settings: dict[str, Any], steps: list[int]) -> dict[str, Any]:
    """The run, then resumed with more steps, in one process; what the trackers have of it."""
    import megadpo
    from megadpo.metrics import background

    background.SECONDS_TO_CLOSE = 300.0  # this is no test of speed
    directory = Path(settings["logging"]["directory"])
    os.environ |= {
        "HF_TOKEN": CANARY,
        "WANDB_API_KEY": CANARY * 2,
        "SWANLAB_API_KEY": CANARY,
        "MLFLOW_TRACKING_URI": IN_A_URL,
    }
    for until in steps:
        settings["train"]["steps"] = until
        megadpo.train(settings)
    project = settings["logging"]["project"]
    return {
        "wandb": trackers.read_wandb(directory),
        "mlflow": trackers.read_mlflow(directory, project),
        "trackio": trackers.read_trackio(project),
        "swanlab": trackers.read_swanlab(directory),
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of 2 steps, resumed to 4, in all of them; its directory, and what they have."""
    for name in NAMES:
        pytest.importorskip(name, reason=f"{name} is an extra of its own")
    directory = tmp_path_factory.mktemp("trackers")
    files = save_files(directory, "llama", 30)
    logging = {"trackers": NAMES, "project": "trials", "run_name": f"first HF_TOKEN={CANARY}", "tags": ["dpo", "trial 1"]}
    logging |= {"directory": str(directory / "trackers"), "offline": True}
    settings = run_settings(files, directory / "run", train={"pairs_per_step": 4}, logging=logging)
    settings["data"]["ignore_columns"] = [IN_A_URL]
    return directory, run_world(1, _train_and_read, settings, [2, 4])[0]


def written(directory: Path) -> dict[str, dict[int, float]]:
    records = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    return {name: {record["step"]: record[name] for record in records} for name in ("loss", "rewards/margins", "grad_norm")}


@pytest.mark.slow
def test_wandb_has_the_metrics_of_both_parts_in_one_run(made: tuple[Path, dict[str, Any]]) -> None:
    directory, found = made
    ids, series, config, exit_code = found["wandb"]
    assert len(ids) >= 2 and set(ids) == {json.loads((directory / "run" / "trackers.json").read_text())["wandb"]}
    assert {name: series[name] for name in written(directory)} == written(directory)
    assert config["train"]["pairs_per_step"] == 4 and exit_code == 0


def test_mlflow_has_one_run_that_has_finished(made: tuple[Path, dict[str, Any]]) -> None:
    directory, found = made
    ((_, status, series, parameters),) = found["mlflow"]
    assert status == "FINISHED" and parameters["train.pairs_per_step"] == "4"
    assert {name: series[name] for name in written(directory)} == written(directory)


def test_trackio_has_one_run(made: tuple[Path, dict[str, Any]]) -> None:
    directory, found = made
    ((name, series, config),) = found["trackio"]
    assert (
        name.startswith("first HF_TOKEN=***-") and config["tags"] == "dpo, trial 1" and config["train.pairs_per_step"] == 4
    )
    assert {name: series[name] for name in written(directory)} == written(directory)


def test_swanlab_has_an_experiment_for_each_part_and_the_second_says_so(made: tuple[Path, dict[str, Any]]) -> None:
    directory, found = made
    (first, before, _), (second, after, _) = found["swanlab"]
    assert (
        first["name"] == second["name"] == "first HF_TOKEN=***"
        and "resumed" in second["tags"]
        and "resumed" not in first["tags"]
    )
    both = {name: before[name] | after[name] for name in written(directory)}
    assert {name: {step: float(value) for step, value in values.items()} for name, values in both.items()} == {
        name: pytest.approx(values) for name, values in written(directory).items()
    }


def test_no_tracker_has_a_secret_in_any_file(made: tuple[Path, dict[str, Any]]) -> None:
    directory, _ = made
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert {name for name in ("mlruns", "wandb", "swanlog") if any(name in path.parts for path in files)} == {
        "mlruns",
        "wandb",
        "swanlog",
    }
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
