"""Loss spikes: what is one, and how many steps were left out because of one.

A spike is a loss or a gradient norm that is not finite, or that lies further above the mean of the last steps than
`train.spike_deviations` times their standard deviation (as in OLMo-core's SkipStepOptimizer, which has 6 of 128 steps). What
lasts is no spike: every finite value counts among the last ones, also that of a step that was left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

WINDOW = 128
"""Steps that a value is compared with."""

FEWEST = 20
"""Before so many steps only what is not finite is a spike."""

LEAST_DEVIATION = 0.1
"""Of the mean: values that hardly differ have no spikes of rounding."""

MOST_IN_A_ROW = 10
"""Steps that are left out one after the other before the run ends."""


@dataclass
class SpikeWatch:
    """The last steps' losses and norms; part of a checkpoint, so that a resumed run decides alike.

    Attributes:
        num_left_out: steps so far that updated nothing.
        num_in_a_row: of them, the last ones without an update between them.
    """

    deviations: float
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    num_left_out: int = 0
    num_in_a_row: int = 0

    def spike(self, loss: float, norm: float) -> str | None:
        """What of a step is a spike, as a clause, or None; takes its loss and gradient norm in."""
        broken = [f"the {name} is {value}" for name, value in _named(loss, norm) if not math.isfinite(value)]
        found = broken or [
            clause
            for (name, value), earlier in zip(_named(loss, norm), (self.norms, self.losses), strict=True)
            if (clause := self._above(name, value, earlier))
        ]
        for value, earlier in ((loss, self.losses), (norm, self.norms)):
            if math.isfinite(value):
                earlier.append(value)
                del earlier[:-WINDOW]
        return " and ".join(found) or None

    def count(self, updated: bool) -> None:
        """Take in whether the step updated anything."""
        self.num_in_a_row = 0 if updated else self.num_in_a_row + 1
        self.num_left_out += not updated

    def _above(self, name: str, value: float, earlier: list[float]) -> str | None:
        if len(earlier) < FEWEST:
            return None
        mean = math.fsum(earlier) / len(earlier)
        deviation = math.sqrt(math.fsum((each - mean) ** 2 for each in earlier) / len(earlier))
        deviation = max(deviation, LEAST_DEVIATION * abs(mean))
        if value <= mean + self.deviations * deviation:
            return None
        text = f"the {name} is {value:.4g}, above the mean {mean:.4g} of the last {len(earlier)} steps"
        return text + (f" by {(value - mean) / deviation:.1f} times their deviation" if deviation > 0 else "")

    def state(self) -> dict[str, Any]:
        """What `load` takes, as JSON."""
        return {
            "losses": list(self.losses),  # a checkpoint may be written while the run goes on
            "norms": list(self.norms),
            "num_left_out": self.num_left_out,
            "num_in_a_row": self.num_in_a_row,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave; from nothing where it is empty (a checkpoint of an earlier version)."""
        self.losses, self.norms = ([float(value) for value in state.get(name, ())] for name in ("losses", "norms"))
        self.num_left_out, self.num_in_a_row = (int(state.get(name, 0)) for name in ("num_left_out", "num_in_a_row"))


def _named(loss: float, norm: float) -> tuple[tuple[str, float], tuple[str, float]]:
    return ("gradient norm", norm), ("loss", loss)
