"""Trackers whose server hangs or whose disk refuses, and secrets in environment, configuration, URLs and exceptions: the run
goes on, and no secret is in anything that is written or said."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.launched import finish_workers
from tests.helpers.runs import run_settings, save_files

CANARY = "canary-57b3d1c0e9"
ENVIRONMENT = {"HF_TOKEN": CANARY, "WANDB_API_KEY": f"{CANARY}-w", "MY_DB_PASSWORD": f"{CANARY}-p"}
URL = f"https://me:{CANARY}@host.example/rows?token={CANARY}"
FEW = {"steps": 2, "pairs_per_step": 4, "tokens_per_micro_batch": 256}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_files(tmp_path_factory.mktemp("files"), "llama", 20)


@pytest.fixture
def dead_server() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def _train(settings: dict[str, Any], environment: dict[str, str], seconds_to_close: float) -> int:
    """`megadpo train`, in a worker of our launcher."""
    from megadpo.cli import main
    from megadpo.metrics import background

    background.SECONDS_TO_CLOSE = seconds_to_close
    os.environ |= environment
    config = Path(settings["output_dir"]).with_suffix(".yaml")
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    status = main(["train", str(config)])
    (config.parent / "ended").write_text(str(time.time()))
    return status


def records(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_trackers_whose_server_hangs_do_not_stop_the_run(files: Path, tmp_path: Path, dead_server: str) -> None:
    for name in ("wandb", "mlflow"):
        pytest.importorskip(name, reason=f"{name} is an extra of its own")
    settings = run_settings(files, tmp_path / "run", train=FEW, logging={"trackers": ["wandb", "mlflow"]})
    environment = {"WANDB_BASE_URL": dead_server, "WANDB_API_KEY": "x" * 40, "MLFLOW_TRACKING_URI": dead_server}
    status, said = finish_workers(1, tmp_path / "log", _train, settings, environment, 1.0)
    assert status == 0, said
    after_training = float((tmp_path / "ended").read_text()) - records(tmp_path / "run")[-1]["time"]
    assert after_training < 60, "both libraries would have waited for 90 s and more"
    assert said.count("wandb has not ended in time") == said.count("mlflow has not ended in time") == 1, said
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "run" / "hf" / "config.json").is_file()


def test_a_tracker_that_cannot_write_is_told_once_and_the_run_goes_on(files: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="mlflow is an extra of its own")
    (tmp_path / "a-file").write_text("")
    logging = {"trackers": ["mlflow"], "directory": str(tmp_path / "a-file"), "offline": True}
    settings = run_settings(files, tmp_path / "run", train=FEW, logging=logging)
    status, said = finish_workers(1, tmp_path / "log", _train, settings, {}, 60.0)
    assert status == 0 and said.count("warning: mlflow has failed") == 1 and "File exists" in said, said
    assert len(records(tmp_path / "run")) == 2


def found_in(directory: Path, *but: str) -> list[Path]:
    """Files that have the secret, but those that the test wrote itself."""
    return [p for p in directory.rglob("*") if p.is_file() and p.name not in but and CANARY.encode() in p.read_bytes()]


@pytest.mark.slow
def test_a_run_leaves_no_secret_in_what_it_writes_and_says(files: Path, tmp_path: Path) -> None:
    changes = {"train": FEW, "checkpoint": {"every": 1}, "logging": {"tensorboard": True, "run_name": f"x {URL}"}}
    settings = run_settings(files, tmp_path / "run", **changes)
    settings["data"]["ignore_columns"] = [URL]
    status, said = finish_workers(1, tmp_path / "log", _train, settings, ENVIRONMENT, 60.0)
    assert status == 0, said
    assert found_in(tmp_path, "run.yaml") == []
    assert "https://***@host.example/rows?token=***" in (tmp_path / "run" / "config.yaml").read_text()
    assert list((tmp_path / "run" / "checkpoints").rglob("checkpoint.json")) and (tmp_path / "run" / "hf").is_dir()
    again, told = finish_workers(1, tmp_path / "log2", _train, settings, {}, 60.0)
    assert again == 0 and "nothing is left to train" in told, "it is the same run, also without these variables"


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("data", "train", URL),
        ("model", "path", f"/models/{CANARY}/nowhere"),
        ("model", "dtype", f"hf_{CANARY.replace('-', '') * 3}"),
        ("logging", "tags", [URL]),
        ("checkpoint", "resume", URL),
    ],
)
def test_a_refusal_shows_no_secret(files: Path, tmp_path: Path, section: str, name: str, value: Any) -> None:
    settings = run_settings(files, tmp_path / "run", train=FEW, **{section: {name: value}})
    status, said = finish_workers(1, tmp_path / "log", _train, settings, ENVIRONMENT, 60.0)
    assert status == 2 and "***" in said and "Traceback" not in said, said
    assert found_in(tmp_path, "run.yaml") == []


def _train_with_a_callback_that_asserts(settings: dict[str, Any]) -> int:
    import megadpo
    from megadpo.training.run import Callbacks

    os.environ |= ENVIRONMENT

    def check(step: int, metrics: dict[str, float]) -> None:
        try:
            raise OSError(13, f"not with {os.environ['MY_DB_PASSWORD']}", URL)
        except OSError as error:
            raise AssertionError(f"step {step} of {os.environ['HF_TOKEN']} at {URL}") from error

    megadpo.train(settings, Callbacks(on_step_end=check))
    return 0


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_crash_shows_no_secret_in_its_traceback(files: Path, tmp_path: Path, nproc: int) -> None:
    settings = run_settings(files, tmp_path / "run", train=FEW)
    status, said = finish_workers(nproc, tmp_path / "log", _train_with_a_callback_that_asserts, settings)
    assert status == 1 and "Traceback" in said and "AssertionError: step 1 of *** at https://***@host.example" in said, said
    assert found_in(tmp_path) == []
