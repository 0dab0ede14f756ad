"""What a run was and how it ended, in `run.json`, and its page, `report.html`: rank 0 writes both, and no failure of a disk
there ends a run."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megadpo.config.sources import eval_label
from megadpo.errors import UserError, reason
from megadpo.files import replacing
from megadpo.launch.signals import EXIT_INTERRUPTED, WORDS, Stopped
from megadpo.metrics.lengths import answer_lengths
from megadpo.model.families import parameter_shapes
from megadpo.parallel.world import rank, world_size
from megadpo.report.run_files import FACTS_FILE
from megadpo.report.write import write_own_page
from megadpo.secrets.redact import redact
from megadpo.training.console import log
from megadpo.training.setup import RunSetup

PACKAGES = ("megadpo", "torch", "megatron-core", "transformers", "tokenizers", "deepspeed")
FORMAT = 1
GROUPS_MEASURED = 10_000
"""Of which the mean lengths of a data set are taken."""


@dataclass
class RunRecord:
    """The record of a run under way; on ranks above 0 it does nothing.

    Attributes:
        first_step: steps that were done before this process began.
        last_step: steps that are done.
        best: of the evaluation whose model was exported: `best_step`, `best_metric` (its name), `best_value`.
        why: it has finished before its last step.
    """

    setup: RunSetup | None = None
    first_step: int = 0
    last_step: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    why: str | None = None
    _sessions: list[dict[str, Any]] = field(default_factory=list)

    def begin(self, setup: RunSetup) -> None:
        """Write down what the run is, and that it begins."""
        if rank() != 0:
            return
        self.setup = setup
        earlier = _sessions_in(setup.output_dir / FACTS_FILE) if setup.resume is not None else []
        self._sessions = [*earlier, {"began": round(time.time(), 3), "status": None}]
        self._write()

    def resumed_at(self, step: int) -> None:
        """Take in how many steps were done before; with the first of them still to come, 0."""
        self.first_step = self.last_step = step
        if self._sessions:
            self._sessions[-1]["first_step"] = step

    def end_by(self, error: BaseException) -> None:
        """Write down what ended it; the page comes with `end`."""
        if isinstance(error, Stopped):
            self._note(WORDS.get(error.status, "stopped"))
        elif isinstance(error, KeyboardInterrupt):
            self._note(WORDS[EXIT_INTERRUPTED])
        elif isinstance(error, UserError):
            self._note("failed", reason(error, 500))
        elif isinstance(error, Exception):
            self._note("failed", f"{type(error).__name__}: {reason(error, 500)}")

    def end(self) -> None:
        """Write down that it has finished, where nothing else has ended it, and the page."""
        if self.setup is None:
            return
        self._note("finished", self.why)
        if self.setup.config.logging.report:
            try:
                log(f"report: {write_own_page(self.setup.output_dir)}")
            except Exception as error:  # a page that cannot be made takes nothing away from what was trained
                log(f"warning: no report: {reason(error)}")
        self.setup = None

    def _note(self, status: str, why: str | None = None) -> None:
        """Write down how it ended; what was noted first stays."""
        if self.setup is None or self._sessions[-1]["status"] is not None:
            return
        self._sessions[-1] |= {
            "ended": round(time.time(), 3),
            "last_step": self.last_step,
            "status": status,
            **self.best,
            **({"reason": redact(why)} if why else {}),
        }
        self._write()

    def _write(self) -> None:
        assert self.setup is not None
        path = self.setup.output_dir / FACTS_FILE
        try:
            with replacing(path) as partial:
                partial.write_text(json.dumps(facts_of(self.setup) | {"sessions": self._sessions}, indent=1) + "\n")
        except OSError as error:
            log(f"warning: {path} cannot be written: {error.strerror or error}")


@contextlib.contextmanager
def recorded() -> Iterator[RunRecord]:
    """Within, a run that has begun its record ends it, whichever way it ends; a second Ctrl-C is not kept waiting."""
    record = RunRecord()
    try:
        yield record
    except (Stopped, KeyboardInterrupt, Exception) as error:
        record.end_by(error)
        record.end()
        raise
    record.end()


def facts_of(setup: RunSetup) -> dict[str, Any]:
    """Model, data, layout and versions of a run, as JSON."""
    shapes = parameter_shapes(setup.policy.shape)
    packings = {"train": setup.train} | {eval_label(name): packing for name, packing in setup.eval.items()}
    return {
        "format": FORMAT,
        "num_steps": setup.num_steps,
        "num_processes": world_size(),
        "layout": str(setup.layout),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "dtype": str(setup.dtype).removeprefix("torch."),
        "model": {
            "type": setup.policy.config.model_type,
            "num_parameters": sum(map(math.prod, shapes.values())),
            "num_trained": sum(map(math.prod, setup.trained_shapes.values())),
        },
        "data": {
            which: {"sentence": setup.reports[which].sentence(), **_measured(packing)}
            for which, packing in packings.items()
            if which != "train" or not setup.stream
        }
        | ({"train": _of_stream(setup)} if setup.stream else {}),
        "versions": {"python": platform.python_version(), **installed_versions()},
    }


def _measured(packing: Any) -> dict[str, float]:
    groups = packing.groups
    lengths = answer_lengths(groups, np.arange(min(len(groups), GROUPS_MEASURED)))
    return {"num_used": len(groups), "num_tokens": int(packing.num_tokens_G.sum()), **lengths}


def _of_stream(setup: RunSetup) -> dict[str, Any]:
    """What is known of streamed groups: their number at the end alone, lengths from the first of them."""
    report = setup.reports["train"]
    lengths = answer_lengths(setup.train.groups, np.arange(len(setup.train.groups)))
    return {"sentence": report.sentence() if report.num_rows else "read as the run goes on", **lengths}


def installed_versions() -> dict[str, str]:
    """Of PACKAGES, where they are installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _sessions_in(path: Path) -> list[dict[str, Any]]:
    """The beginnings and ends that an earlier process of this run has written."""
    try:
        sessions = json.loads(path.read_bytes())["sessions"]
        return [one for one in sessions if isinstance(one, dict)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
