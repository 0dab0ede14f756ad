"""The best evaluation of a run by one metric, and how many evaluations have brought none that is better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_KNOWN = 8
"""Best evaluations that are remembered: an earlier one counts where the checkpoint of a later one could not be written."""


@dataclass
class Best:
    """What the evaluations of a run have given so far.

    Attributes:
        metric: its name in an evaluation's record; None: nothing is looked for.
        is_more_better: whether more of it is better.
        patience: so many evaluations in a row may bring no improvement; None: any number.
        min_improvement: by how much an evaluation must be better than the best before it to be an improvement.
        held_out: a digest of the pairs that are evaluated.
        found: step and value of each evaluation that was the best when it came, in order.
        num_without: evaluations since the last improvement.
    """

    metric: str | None = None
    is_more_better: bool = False
    patience: int | None = None
    min_improvement: float = 0.0
    held_out: str = ""
    found: list[tuple[int, float]] = field(default_factory=list)
    num_without: int = 0

    @property
    def step(self) -> int | None:
        """Of the best evaluation; None: there is none."""
        return self.found[-1][0] if self.found else None

    @property
    def value(self) -> float | None:
        """The metric there."""
        return self.found[-1][1] if self.found else None

    @property
    def steps(self) -> list[int]:
        """Those at which an evaluation was the best when it came, the best one last."""
        return [step for step, _ in self.found]

    def value_at(self, step: int) -> float | None:
        """The metric of one of `steps`."""
        return dict(self.found).get(step)

    def take(self, step: int, record: Mapping[str, float]) -> bool:
        """Take in an evaluation; whether it is the best so far. What has no number is no improvement."""
        if self.metric is None:
            return False
        value = record.get(self.metric, math.nan)
        gain = math.inf if self.value is None else (value - self.value) * (1 if self.is_more_better else -1)
        is_best = math.isfinite(value) and gain > 0
        self.num_without = 0 if is_best and gain >= self.min_improvement else self.num_without + 1
        if is_best:
            self.found = [*self.found, (step, value)][-MOST_KNOWN:]
        return is_best

    @property
    def is_out_of_patience(self) -> bool:
        """Whether the run is to end."""
        return self.patience is not None and self.num_without >= self.patience

    def state(self) -> dict[str, Any]:
        """What `load` takes, as JSON."""
        found = [list(one) for one in self.found]
        return {"metric": self.metric, **self._about(), "found": found, "num_without": self.num_without}

    def load(self, state: Mapping[str, Any]) -> bool:
        """Go on from what `state` gave, where it is of the same metric, direction and pairs; else from nothing. Whether it
        went on."""
        if self.metric is None or state.get("metric") != self.metric or not self._about().items() <= state.items():
            return False
        self.found = [(int(step), float(value)) for step, value in state["found"]]
        self.num_without = int(state["num_without"])
        return True

    def _about(self) -> dict[str, Any]:
        return {"is_more_better": self.is_more_better, "held_out": self.held_out}
