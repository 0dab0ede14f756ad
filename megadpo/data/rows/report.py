"""How many rows of a data set were kept, dropped or truncated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from megadpo.errors import UserError

MOST_NAMED, MOST_COUNTED = 20, 1000
MUCH_TRUNCATION = 0.1
"""Beyond this part of the rows, truncation is worth a warning."""

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
        num_cut_prompts: of the truncated, those that lost tokens of a prompt.
        num_cut_answers: of the truncated, those that lost tokens of a response.
        num_implicit_prompts: kept groups whose prompt is the common beginning of two texts.
        num_empty_prompts: kept groups without any prompt.
        unread: columns with text that nothing reads, and how many rows have each.
        splits: which splits were read, a line for each source that has some.
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
    num_cut_prompts: int = 0
    num_cut_answers: int = 0
    num_implicit_prompts: int = 0
    num_empty_prompts: int = 0
    unread: dict[str, int] = field(default_factory=dict)
    splits: list[str] = field(default_factory=list)
    num_desirable: int = 0
    num_undesirable: int = 0

    def add(self, other: DataReport) -> None:
        """Add the counts of another part of the rows."""
        self.dropped = dict(Counter(self.dropped) + Counter(other.dropped))
        self.unread = dict((Counter(self.unread) + Counter(other.unread)).most_common(MOST_COUNTED))
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
        parts += [f"{self.num_truncated:,} truncated ({self._cut()})"] * bool(self.num_truncated)
        parts += [f"{self.num_implicit_prompts:,} with their common beginning as prompt"] * bool(self.num_implicit_prompts)
        parts += [f"{self.num_empty_prompts:,} with no prompt"] * bool(self.num_empty_prompts)
        parts += [f"{self.num_unshared:,} without a common prompt"] * bool(self.num_unshared)
        parts += [f"{self.num_moved_boundaries:,} with a moved boundary"] * bool(self.num_moved_boundaries)
        return ", ".join(parts)

    def _cut(self) -> str:
        """Which side lost tokens."""
        sides = [f"the prompt of {self.num_cut_prompts:,}"] * bool(self.num_cut_prompts)
        return ", ".join(sides + [f"an answer of {self.num_cut_answers:,}"] * bool(self.num_cut_answers))

    def remarks(self) -> list[str]:
        """What the user should know besides, a line each: splits, columns that nothing reads, much truncation."""
        lines = list(self.splits)
        if self.unread:
            names = ", ".join(f"{name} ({count:,})" for name, count in sorted(self.unread.items())[:MOST_NAMED])
            more = f" and {len(self.unread) - MOST_NAMED:,} more" if len(self.unread) > MOST_NAMED else ""
            lines.append(
                f"nothing reads the text in {names}{more}; data.columns renames, data.ignore_columns says it is meant"
            )
        if self.num_kept and self.num_truncated > MUCH_TRUNCATION * self.num_kept:
            lines.append(
                f"warning: {self.num_truncated:,} of {self.num_kept:,} {self.noun}s are longer than data.max_length and "
                f"lose tokens ({self._cut()}); raise it if that matters"
            )
        return lines

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
