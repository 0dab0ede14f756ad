"""The run in experiment trackers: W&B, MLflow, trackio, SwanLab, each by its own library and its own settings.

None of them is imported unless it is asked for. What a run is there (an id, a name) is kept in `output_dir/trackers.json`,
so that a resumed run goes on in the same one. They are given metrics and the configuration with its secrets hidden; nothing
is collected of the terminal, the code, git or the command line.
"""

from __future__ import annotations

import importlib.util
import json
import math
import netrc
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megadpo.errors import UserError
from megadpo.files import replacing
from megadpo.metrics.background import Record, Tracker

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny", "trackio": "trackio", "swanlab": "swanlab"}
"""Of each tracker, what pip installs; its name is the module's."""
KEPT = "trackers.json"
_lock = threading.Lock()


@dataclass(frozen=True)
class TrackedRun:
    """What trackers are told of a run.

    Attributes:
        name: shown there.
        directory: where they write on this machine.
        has_chosen_directory: the user has named it; else trackio writes where its own commands look.
        is_offline: nothing leaves it.
        config: nested, its secrets hidden.
        kept: the file that remembers what the run is in each tracker.
        is_resumed: it is the run that `kept` names.
        log: shows the user a line.
    """

    project: str
    name: str
    directory: Path
    has_chosen_directory: bool
    is_offline: bool
    kept: Path
    is_resumed: bool
    tags: list[str] = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=dict)
    log: Callable[[str], None] = print

    def remembered(self, tracker: str) -> str | None:
        """What this run is in a tracker, if it was there before."""
        return _read(self.kept).get(tracker) if self.is_resumed else None

    def remember(self, tracker: str, what: str) -> None:
        """Keep what the run is in a tracker; where the disk refuses, it is a new one there when it is resumed."""
        with _lock:
            try:
                known = _read(self.kept) | {tracker: what}
                with replacing(self.kept) as partial:
                    partial.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            except OSError as error:
                self.log(
                    f"warning: {self.kept} cannot be written ({error.strerror or error}): resumed, it is a new {tracker} run"
                )

    def own_directory(self) -> str:
        """The directory, made."""
        self.directory.mkdir(parents=True, exist_ok=True)
        return str(self.directory.absolute())


def _read(path: Path) -> dict[str, str]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): what for name, what in known.items() if isinstance(what, str)} if isinstance(known, dict) else {}


def require_installed(names: list[str]) -> None:
    """Raises UserError where a tracker's library is not there."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"logging.trackers: {name} is not installed; run `pip install {PACKAGES[name]}`, or take it out of the list"
            )


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options under dotted names."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


class WandbTracker:
    """A W&B run: online where the user is logged in or has said so (WANDB_API_KEY, WANDB_MODE), else offline."""

    def __init__(self, run: TrackedRun) -> None:
        if run.is_offline:
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        mode: Any = "offline" if run.is_offline else os.environ.get("WANDB_MODE")
        if mode is None and not _is_logged_in_to_wandb():
            mode = "offline"
            run.log("W&B has no API key here: its run is written offline (`wandb sync` sends it; or set WANDB_API_KEY)")
        before = run.remembered("wandb")
        name = before or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=name,
            resume="allow",
            mode=mode,
            dir=run.own_directory(),
            tags=run.tags or None,
            config=dict(run.config),
            reinit="create_new",
            settings=wandb.Settings(
                console="off", disable_git=True, disable_code=True, disable_job_creation=True, x_disable_meta=True
            ),
        )
        if before is None:
            run.remember("wandb", name)
        # A resumed run writes steps again that had been there: W&B's own counter would refuse them.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        self._run.log(dict(record))

    def close(self, has_failed: bool) -> None:
        self._run.finish(exit_code=int(has_failed))


def _is_logged_in_to_wandb() -> bool:
    """Whether there is a key, without which W&B would ask for one on the terminal."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC") or os.path.expanduser("~/.netrc")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class MlflowTracker:
    """An MLflow run: where MLFLOW_TRACKING_URI says, else in files."""

    def __init__(self, run: TrackedRun) -> None:
        uri = None if run.is_offline else os.environ.get("MLFLOW_TRACKING_URI")
        if run.is_offline:
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        if uri is None:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (Path(run.own_directory()) / "mlruns").as_uri()
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, MlflowClient(tracking_uri=uri)
        before = run.remembered("mlflow")
        if before is not None:
            self._id = before
            self._client.update_run(before, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(run.project)
        number = self._client.create_experiment(run.project) if experiment is None else experiment.experiment_id
        self._id = self._client.create_run(number, run_name=run.name, tags=dict.fromkeys(run.tags, "")).info.run_id
        run.remember("mlflow", self._id)
        options = [Param(name, str(value)[:500]) for name, value in flat(run.config).items()]
        for start in range(0, len(options), 100):  # as many as MLflow takes at once
            self._client.log_batch(self._id, params=options[start : start + 100])

    def write(self, record: Record) -> None:
        now, step = round(record.get("time", time.time()) * 1000), int(record["step"])
        metrics = [self._metric(name, float(value), now, step) for name, value in record.items() if name != "step"]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, has_failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if has_failed else "FINISHED")


class TrackioTracker:
    """A trackio run: in TRACKIO_DIR on this machine, or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says."""

    def __init__(self, run: TrackedRun) -> None:
        remote = [name for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL") if os.environ.get(name)]
        if run.is_offline and remote:
            raise UserError(f"logging.offline is true, but {remote[0]} is set")
        if run.has_chosen_directory:
            os.environ.setdefault("TRACKIO_DIR", run.own_directory())  # read when it is imported
        import trackio

        before = run.remembered("trackio")
        name = before or f"{run.name}-{uuid.uuid4().hex[:6]}"
        self._run = trackio.init(
            project=run.project,
            name=name,
            config=flat(run.config) | ({"tags": ", ".join(run.tags)} if run.tags else {}),
            resume="never" if before is None else "allow",
            embed=False,
            auto_log_cpu=False,
        )
        self._finish = trackio.finish
        if before is None:
            run.remember("trackio", name)

    def write(self, record: Record) -> None:
        numbers = {name: value for name, value in record.items() if name not in ("step", "time")}
        self._run.log(numbers, step=int(record["step"]))

    def close(self, has_failed: bool) -> None:
        self._finish()


class SwanlabTracker:
    """A SwanLab experiment: in the cloud where the user is logged in or SWANLAB_MODE says, else in files.

    SwanLab cannot go on with an experiment: a resumed run is one of the same name with the tag "resumed".
    """

    def __init__(self, run: TrackedRun) -> None:
        import swanlab  # type: ignore[import-untyped]
        from swanlab.package import get_key  # type: ignore[import-untyped]

        mode: Any = "offline" if run.is_offline else os.environ.get("SWANLAB_MODE")
        if mode is None and not os.environ.get("SWANLAB_API_KEY"):
            try:
                get_key()
            except Exception:
                mode = "offline"
                run.log("SwanLab has no API key here: its experiment is written offline (`swanlab sync` sends it)")
        self._swanlab = swanlab
        swanlab.init(
            project=run.project,
            experiment_name=run.name,
            tags=[*run.tags, "resumed"] if run.is_resumed else run.tags,
            config=dict(run.config),
            logdir=str(Path(run.own_directory()) / "swanlog"),
            mode=mode,
            settings=swanlab.Settings(metadata_collect=False, requirements_collect=False, log_proxy_type="none"),
        )

    def write(self, record: Record) -> None:
        numbers = {name: value for name, value in record.items() if name != "step" and math.isfinite(value)}
        self._swanlab.log(numbers, step=int(record["step"]))

    def close(self, has_failed: bool) -> None:
        state = self._swanlab.State.CRASHED if has_failed else self._swanlab.State.SUCCESS
        self._swanlab.finish(state, error="the run has failed" if has_failed else None)


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
    "trackio": TrackioTracker,
    "swanlab": SwanlabTracker,
}
"""By the names of `logging.trackers`."""
