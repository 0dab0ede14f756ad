"""What a user gives a run beside options: functions that it calls on rank 0, and what they are given."""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megadpo.errors import UserError

if TYPE_CHECKING:
    from megadpo.config.schema import Config
    from megadpo.engine.base import Engine
    from megadpo.training.setup import RunSetup

Metrics = dict[str, float]
FloatArray = npt.NDArray[np.float64]
METRIC_NAME = re.compile(r"[A-Za-z0-9_./@-]+")


@dataclass(frozen=True)
class RunInfo:
    """What `Callbacks.on_begin` is given.

    Attributes:
        config: the options, with their defaults spelled out.
        num_steps: optimizer steps of the whole run.
        first_step: those that are done; above 0 where the run goes on.
        output_dir: the run's directory.
        setup: data, layout, model files.
        engine: keeps parameters, gradients and optimizer state of this rank; its methods that need all ranks (`state`,
            `parameters`, `forward`) must not be called here, for only rank 0 is.
    """

    config: Config
    num_steps: int
    first_step: int
    output_dir: Path
    setup: RunSetup
    engine: Engine


@dataclass(frozen=True)
class EvaluatedSet:
    """What `Callbacks.compute_metrics` is given of one held-out set. Arrays are numpy's, in the order of the rows.

    Attributes:
        name: of the set in `data.eval`; "" where it has none.
        kind: of its rows: "pairs", "lists", "labels" or "examples".
        rows: int64 [G]: of each group (a pair, a list, an example, a labelled answer) its row in the set's data, from 0.
        groups: int64 [R]: of each response the group that it belongs to, as a place in `rows`.
        logps: float64 [R]: sum of the policy's log-probs of a response's tokens, as the loss reads it.
        reference_logps: float64 [R], the same under the reference; zeros where the loss reads none.
        lengths: int64 [R]: the tokens that were summed.
        rewards: float64 [R]: what the metrics call the reward.
        labels: float64 [R]: of labelled answers, 1 for a desirable one and 0 for an undesirable one; of others 1.
        metrics: what the evaluation has given for this set, by name without prefix: "loss", "rewards/margins", …
    """

    name: str
    kind: str
    rows: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]
    logps: FloatArray
    reference_logps: FloatArray
    lengths: npt.NDArray[np.int64]
    rewards: FloatArray
    labels: FloatArray
    metrics: Mapping[str, float]

    def chosen(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[G] of [R]: of each pair the chosen response's, of a list the best one's."""
        return values[np.searchsorted(self.groups, np.arange(len(self.rows)))]

    def rejected(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[G] of [R]: of each pair the rejected response's.

        Raises:
            ValueError: the rows are no pairs.
        """
        if self.kind != "pairs":
            raise ValueError(f"the set's rows are {self.kind}, which have no rejected response each")
        return values[1::2]


@dataclass(frozen=True)
class Callbacks:
    """Functions called on rank 0 while training; all optional. Every process is given the same.

    Where `on_step_end` or `on_evaluation` returns False, the run ends on all ranks as after its last step: with a
    checkpoint, an export and a report. Whatever else they return, it goes on.

    Attributes:
        on_begin: (`RunInfo`) once, before the first step.
        on_step_end: (step, metrics) after every optimizer step; steps count from 1.
        on_evaluation: (step, metrics) after every evaluation.
        on_save: (step, directory) after a checkpoint is written.
        compute_metrics: (`EvaluatedSet`) for every held-out set of an evaluation; gives names with numbers, which are
            metrics of that set, under `eval_` or `eval_NAME_`.
    """

    on_step_end: Callable[[int, Metrics], Any] | None = None
    on_evaluation: Callable[[int, Metrics], Any] | None = None
    on_save: Callable[[int, Path], Any] | None = None
    on_begin: Callable[[RunInfo], Any] | None = None
    compute_metrics: Callable[[EvaluatedSet], Mapping[str, float]] | None = None

    @staticmethod
    def checked(given: Any) -> Callbacks:
        """What a user has given as callbacks, None for none.

        Raises:
            UserError: something else than Callbacks, or than functions in it.
        """
        if given is None:
            return Callbacks()
        if not isinstance(given, Callbacks):
            raise UserError(
                f"callbacks is a {type(given).__name__}; give megadpo.Callbacks(on_step_end=…, on_evaluation=…, on_save=…)"
            )
        for item in fields(given):
            function = getattr(given, item.name)
            if function is not None and not callable(function):
                raise UserError(f"callbacks.{item.name} is a {type(function).__name__}, not a function")
        return given

    def names(self) -> list[str]:
        """Those that there are."""
        return [item.name for item in fields(self) if getattr(self, item.name) is not None]


def is_no(answer: Any) -> bool:
    """Whether what a callback has returned is False, Python's or numpy's."""
    return isinstance(answer, bool | np.bool_) and not answer


def checked_metrics(given: Any, prefix: str, known: Container[str]) -> Metrics:
    """What `compute_metrics` has returned, each name behind `prefix` unless it has that already.

    Args:
        known: names of metrics that there are, of any set.

    Raises:
        UserError: it is no mapping of names to numbers, or a name is one that there is.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"callbacks.compute_metrics gave a {type(given).__name__}; it must give a dict of names to numbers")
    found: Metrics = {}
    for name, value in given.items():
        if not isinstance(name, str) or not METRIC_NAME.fullmatch(name):
            raise UserError(
                f"callbacks.compute_metrics gave the name {str(name)[:40]!r}; use letters, digits, `_`, `-`, `.`, `/` and @"
            )
        number = value.item() if isinstance(value, np.ndarray | np.generic) and value.size == 1 else value
        if not isinstance(number, numbers.Real) or isinstance(number, bool):
            raise UserError(f"callbacks.compute_metrics gave {str(value)[:40]!r} for {name}, which is no number")
        full = prefix + name.removeprefix(prefix)
        if full in known or full in found:
            raise UserError(f"callbacks.compute_metrics gave {name}, but {full} is a metric already; give it another name")
        found[full] = float(number)
    return found
