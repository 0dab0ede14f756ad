"""A finding: something about a run that its user should know, in plain words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megadpo.objectives.specs import SPECS, needs_reference
from megadpo.report.limits import FEWEST_RECORDS
from megadpo.report.run_files import Curve, RunFiles
from megadpo.report.series import together


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes:
        name: for scripts, such as "chosen_falls"; it stays.
        level: "problem" (the run is of no use as it is), "warning" (look at it), "note".
        title: in a few words.
        step: where it starts; None: of the whole run.
        what: what was seen, with its numbers.
        advice: what to do.
        pairs: those that it is about, as spikes.jsonl has them.
    """

    name: str
    level: str
    title: str
    step: int | None
    what: str
    advice: str
    pairs: Sequence[dict[str, Any]] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"pairs": list(self.pairs)}


@dataclass(frozen=True)
class Check:
    """What is looked for: `find` gives the finding, or None. `question` is what it asks, for the list of all."""

    name: str
    question: str
    find: Callable[[RunFiles], Finding | None]


def long_enough(curve: Curve) -> Curve | None:
    """The finite values of a metric, where there are enough of them to speak of a course."""
    finite = curve.finite()
    return finite if len(finite) >= FEWEST_RECORDS else None


def loss_types(run: RunFiles) -> list[str]:
    """The losses of a run; none where its options cannot be read, or name a loss that is not known."""
    given = run.option("objective.loss_type")
    names = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    return names if names and all(name in SPECS for name in names) else []


def reads_reference(run: RunFiles) -> bool:
    """Whether `rewards/…` are beta times log-ratios."""
    losses = loss_types(run)
    return bool(losses) and needs_reference(losses)


def log_ratio(run: RunFiles, side: str, prefix: str = "") -> Curve:
    """log p - log p_reference of the chosen or rejected answers, in nats an answer; no steps where no loss reads a
    reference."""
    beta = run.option("objective.beta")
    if not reads_reference(run) or not isinstance(beta, int | float) or not beta > 0:
        return Curve([], [])
    rewards = run.curve(f"{prefix}rewards/{side}").finite()
    return Curve(rewards.steps, [value / beta for value in rewards.values])


def reference_logps(run: RunFiles, side: str, prefix: str = "") -> Curve:
    """log p_reference of the chosen or rejected answers, in nats an answer; no steps where no loss reads a reference."""
    ratio = log_ratio(run, side, prefix)
    return together(run.curve(f"{prefix}logps/{side}").finite(), ratio, lambda logp, z: logp - z)


def pairs_of(run: RunFiles, records: int) -> float:
    """How many pairs so many records of the training metrics are about."""
    size = run.option("train.pairs_per_step")
    return records * (size if isinstance(size, int) else 1)
