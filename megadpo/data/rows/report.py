"""How many rows of a data set were kept, dropped or truncated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from megadpo.errors import UserError

_NOUNS = {"pairs": "pair", "labels": "labelled answer", "lists": "list", "examples": "example"}


def counted(number: int, noun: str) -> str:
    """ "1 step", "3 steps"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@dataclass
class DataReport:
    """Counts of a data set's rows.

    Attributes:
        kind: what the rows were read as (`Reading.kind`).
        num_rows: rows read.
        num_kept: groups made of them.
        dropped: rows dropped, by reason.
        num_unshared: kept groups whose responses have different prompts.
        num_truncated: kept groups that lost tokens to `max_length`.
        num_moved_boundaries: kept groups whose prompt's last tokens merge with the completion, or whose template
            renders the prompt's end differently with an answer.
        num_desirable: responses of kept groups that are labelled desirable.
        num_undesirable: responses of kept groups that are labelled undesirable.
    """

    kind: str = "pairs"
    num_rows: int = 0
    num_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    num_unshared: int = 0
    num_truncated: int = 0
    num_moved_boundaries: int = 0
    num_desirable: int = 0
    num_undesirable: int = 0

    def add(self, other: DataReport) -> None:
        """Add the counts of another part of the rows."""
        self.dropped = dict(Counter(self.dropped) + Counter(other.dropped))
        for name in (item.name for item in fields(self) if item.name.startswith("num_")):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def noun(self) -> str:
        """What one row of this kind is called, in messages."""
        # A pair that is read as labelled answers counts as two.
        are_pairs = self.kind == "labels" and self.num_desirable + self.num_undesirable > self.num_kept
        return "row" if are_pairs else _NOUNS[self.kind]

    def sentence(self) -> str:
        """One line for the console."""
        parts = [f"{self.num_kept:,} of {self.num_rows:,} {self.noun}s kept"]
        if self.kind == "labels":
            parts += [f"{self.num_desirable:,} desirable", f"{self.num_undesirable:,} undesirable"]
        parts += [f"{count:,} dropped ({reason})" for reason, count in sorted(self.dropped.items())]
        parts += [f"{self.num_truncated:,} truncated"] * bool(self.num_truncated)
        parts += [f"{self.num_unshared:,} without a common prompt"] * bool(self.num_unshared)
        parts += [f"{self.num_moved_boundaries:,} with a moved boundary"] * bool(self.num_moved_boundaries)
        return ", ".join(parts)

    def check(self, sources: Sequence[str]) -> None:
        """Refuse a data set that is useless for training.

        Raises:
            UserError: where no group is left, or where all labels are the same.
        """
        names = ", ".join(sources)
        if not self.num_kept:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
            why = f"{self.num_rows} rows read, dropped: {reasons}" if self.num_rows else "there is no row in it"
            raise UserError(f"data: no {_NOUNS[self.kind]} is left of {names}: {why}")
        if self.kind == "labels" and not (self.num_desirable and self.num_undesirable):
            which, value = ("desirable", "true") if self.num_desirable else ("undesirable", "false")
            raise UserError(
                f"data: all {self.num_kept:,} rows are {which} (`label` is {value}) in {names}; a loss of labelled "
                "answers needs both desirable and undesirable ones"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)
