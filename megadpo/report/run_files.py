"""What a run directory holds for its report: options, metrics, facts, spikes, an evaluation. Read as it is found: a run that
goes on, that was killed, that is of an older version; a file or a line that is damaged is left out, and said."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megadpo.config import yaml_core
from megadpo.config.schema import Config
from megadpo.errors import UserError
from megadpo.secrets.redact import redacted

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
FACTS_FILE = "run.json"
"""What a run was: model, data, layout, versions, and its beginnings and ends."""
SPIKES_FILE = "spikes.jsonl"
"""A line a spike of the loss or the gradient norm, with the step's pairs."""
EVALUATION_FILE = "eval/eval.json"
EVAL_PREFIX = "eval_"


@dataclass(frozen=True)
class Curve:
    """A metric over the steps at which it was written; nan where it was no number."""

    steps: list[int]
    values: list[float]

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> Curve:
        """Without what is not finite."""
        kept = [(step, value) for step, value in zip(self.steps, self.values, strict=True) if math.isfinite(value)]
        return Curve([step for step, _ in kept], [value for _, value in kept])


NOTHING = Curve([], [])


@dataclass(frozen=True)
class RunFiles:
    """A run as its directory tells it.

    Attributes:
        name: how it is called beside other runs.
        config: of config.yaml, with the defaults of what an older version did not have.
        curves: by metric, in the order of their first appearance; "eval_…" are those of held-out rows.
        facts: of run.json; empty for a run of a version without it.
        spikes: of spikes.jsonl; None for a run of a version without it.
        evaluation: of eval/eval.json; None where there is none.
        damaged: what could not be read, a sentence each.
    """

    directory: Path
    name: str
    config: Mapping[str, Any]
    curves: Mapping[str, Curve]
    facts: Mapping[str, Any] = field(default_factory=dict)
    spikes: list[dict[str, Any]] | None = None
    evaluation: Mapping[str, Any] | None = None
    damaged: tuple[str, ...] = ()

    def curve(self, name: str) -> Curve:
        """A metric; no steps where the run has none of it."""
        return self.curves.get(name, NOTHING)

    def option(self, key: str) -> Any:
        """The value of `section.name`; None where there is none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def fact(self, *names: str) -> Any:
        """A value of run.json; None where there is none."""
        value: Any = self.facts
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    @property
    def held_out_sets(self) -> list[str]:
        """The names of the held-out sets; of one without a name, or of none, just ""."""
        given = self.option("data.eval")
        return [str(name) for name in given] if isinstance(given, Mapping) and "path" not in given else [""]

    @property
    def last_step(self) -> int:
        """The last step that was written; 0 where none was."""
        return max((curve.steps[-1] for curve in self.curves.values() if curve.steps), default=0)

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole run, as planned; None where nobody has said."""
        planned = self.fact("num_steps") or self.option("train.steps")
        return planned if isinstance(planned, int) else None

    @property
    def sessions(self) -> list[Mapping[str, Any]]:
        """The beginnings of the run, each with its end where it had one."""
        found = self.fact("sessions")
        return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []

    @property
    def status(self) -> str:
        """finished, preempted, interrupted, failed; "not ended" (it runs, or was killed without a word); "unknown" of a run
        of an older version that has exported no model."""
        if self.sessions:
            return str(self.sessions[-1].get("status") or "not ended")
        return "finished" if (self.directory / "hf").is_dir() else "unknown"


def read_runs(directories: Iterable[Path]) -> list[RunFiles]:
    """The runs in these directories, each under a name of its own.

    Raises:
        UserError: one of them is no run, or has been given twice.
    """
    directories = list(directories)
    resolved = [directory.resolve() for directory in directories]
    for place, directory in enumerate(resolved):
        if directory in resolved[:place]:
            raise UserError(f"RUN: {directories[place]} is given twice; give each run once")
    return [read_run(path, name) for path, name in zip(directories, _names(resolved), strict=True)]


def read_run(directory: Path, name: str | None = None) -> RunFiles:
    """The run in a directory.

    Raises:
        UserError: it is no run.
    """
    if not directory.is_dir():
        raise UserError(f"RUN: {directory} is not a directory; give the output_dir of a run")
    if not (directory / CONFIG_FILE).is_file() and not (directory / METRICS_FILE).is_file():
        raise UserError(f"RUN: {directory} holds no run (no {CONFIG_FILE}, no {METRICS_FILE}); give the output_dir of a run")
    damaged: list[str] = []
    spikes = None
    if (directory / SPIKES_FILE).is_file():
        spikes = list(_lines(directory / SPIKES_FILE, damaged))
    return RunFiles(
        directory=directory,
        name=name or _names([directory.resolve()])[0],
        config=_config(directory / CONFIG_FILE, damaged),
        curves=_curves(_lines(directory / METRICS_FILE, damaged)),
        facts=_object(directory / FACTS_FILE, damaged) or {},
        spikes=spikes,
        evaluation=_object(directory / EVALUATION_FILE, damaged),
        damaged=tuple(damaged),
    )


def _names(directories: list[Path]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    for count in range(1, 1 + max((len(path.parts) for path in directories), default=1)):
        names = ["/".join(path.parts[-count:]) for path in directories]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in directories]


def _config(path: Path, damaged: list[str]) -> Mapping[str, Any]:
    defaults = Config().to_dict()
    try:
        written = yaml_core.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        damaged.append(f"{path.name} cannot be read: {' '.join(str(error).split())[:200]}")
        return {}
    if not isinstance(written, Mapping):
        damaged.append(f"{path.name} holds no options")
        return {}
    written, filled = redacted(written), {}  # an older version wrote secrets as they were given
    for section, default in defaults.items():
        value = written.get(section, default)
        filled[section] = {**default, **value} if isinstance(default, Mapping) and isinstance(value, Mapping) else value
    return {**filled, **{str(key): value for key, value in written.items() if key not in filled}}


def _curves(records: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """Each metric over its steps; of several lines of a step, the last one with it counts."""
    columns: dict[str, dict[int, float]] = {}
    for record in records:
        step = record.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            continue
        spelled = record.get("non_finite")
        for name, value in {**record, **(spelled if isinstance(spelled, Mapping) else {})}.items():
            number = _number(value)
            if number is not None and name != "step":
                columns.setdefault(name, {})[step] = number
    return {name: Curve(sorted(column), [column[step] for step in sorted(column)]) for name, column in columns.items()}


def _number(value: object) -> float | None:
    """A number of a record, or what is spelled out under `non_finite`."""
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _lines(path: Path, damaged: list[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, a line each."""
    num_broken = 0
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    value = None
                if isinstance(value, dict):
                    yield value
                else:
                    num_broken += bool(line.strip())
    except FileNotFoundError:
        return
    except OSError as error:
        damaged.append(f"{path.name} cannot be read: {error.strerror or error}")
    if num_broken:
        damaged.append(
            f"{path.name}: {num_broken:,} line{'s are' if num_broken > 1 else ' is'} no whole record and left out"
        )


def _object(path: Path, damaged: list[str]) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        damaged.append(f"{path.name} cannot be read: {' '.join(str(error).split())[:200]}")
        return None
    if not isinstance(value, dict):
        damaged.append(f"{path.name} is no JSON object")
        return None
    return value
