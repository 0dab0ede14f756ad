"""What experiment trackers have written, read by their own libraries, or by the form of their files where these cannot."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Series = dict[str, dict[int, float]]
"""Metric -> step -> value."""


def read_wandb(directory: Path) -> tuple[list[str], Series, dict[str, Any], int | None]:
    """Of the offline runs in a directory, oldest first: their ids, metrics, the configuration, the last exit code."""
    import json

    from wandb.proto import wandb_internal_pb2

    ids: list[str] = []
    series: Series = {}
    config: dict[str, Any] = {}
    exit_code = None
    for file in sorted(directory.glob("wandb/offline-run-*/run-*.wandb")):
        for content in _level_db_records(file.read_bytes()[7:]):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.append(record.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "history":
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                for name, value in row.items():
                    if not name.startswith("_"):
                        series.setdefault(name, {})[row["step"]] = value
            elif kind == "exit":
                exit_code = record.exit.exit_code
    return ids, series, config, exit_code


def _level_db_records(content: bytes, block: int = 32768) -> Iterator[bytes]:
    """Records of a LevelDB log (its doc/log_format.md), whose first block has lost the 7 bytes of W&B's own head."""
    at, collected = 0, b""
    while at + 7 <= len(content):
        left = block - (at + 7) % block
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        if kind == 0:
            return
        collected += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield collected
            collected = b""


def read_mlflow(directory: Path, project: str) -> list[tuple[str, str, Series, dict[str, str]]]:
    """Of each run of a project: id, status, metrics, parameters."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(directory / "mlruns").as_uri())
    experiment = client.get_experiment_by_name(project)
    assert experiment is not None
    found = []
    for run in client.search_runs([experiment.experiment_id]):
        series = {
            name: {each.step: each.value for each in client.get_metric_history(run.info.run_id, name)}
            for name in run.data.metrics
        }
        found.append((run.info.run_id, run.info.status, series, run.data.params))
    return found


def read_trackio(project: str) -> list[tuple[str, Series, dict[str, Any]]]:
    """Of each run of a project in TRACKIO_DIR: name, metrics, configuration."""
    from trackio.sqlite_storage import SQLiteStorage

    found = []
    for name in SQLiteStorage.get_runs(project):
        series: Series = {}
        for row in SQLiteStorage.get_logs(project, name):
            for metric, value in row.items():
                if metric not in ("step", "timestamp"):
                    series.setdefault(metric, {})[row["step"]] = value
        found.append((name, series, SQLiteStorage.get_run_config(project, name) or {}))
    return found


def read_swanlab(directory: Path) -> list[tuple[dict[str, Any], Series, str]]:
    """Of each experiment, oldest first: what it is, metrics, and all that was written, as text."""
    from swanlab.log.backup.datastore import DataStore
    from swanlab.log.backup.models import BaseModel

    found = []
    for file in sorted(directory.glob("swanlog/run-*/backup.swanlab"), key=lambda path: path.stat().st_mtime):
        store = DataStore()
        store.open_for_scan(str(file))
        about: dict[str, Any] = {}
        series: Series = {}
        text = ""
        for line in store:
            text += line
            model: Any = BaseModel.from_record(line)
            kind, values = type(model).__name__, model.model_dump()
            if kind == "Experiment":
                about |= values
            elif kind in ("Scalar", "Metric"):
                series.setdefault(values["key"], {})[values["step"]] = values["metric"]["data"]
            elif kind == "Footer":
                about["success"] = values["success"]
        found.append((about, series, text))
    return found
