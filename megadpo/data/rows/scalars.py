"""Numbers in rows: weights, margins, probabilities, scores, ranks and labels."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from decimal import Decimal
from typing import Any

from megadpo.errors import UserError

SPELLINGS = {
    "margin": ("margin",),
    "weight": ("weight",),
    "label_probability": ("label_probability",),
    "chosen_score": ("chosen_score", "score_chosen", "chosen_rating"),
    "rejected_score": ("rejected_score", "score_rejected", "rejected_rating"),
    "responses": ("responses", "completions"),
    "scores": ("scores", "ranks"),
}
"""Fields that files spell in several ways, each with all its spellings (`scores` and `ranks` are told apart later)."""

NAMES = frozenset({"margin", "weight", "label_probability", "score"})
"""The names that `Reading.row_values` may have."""

_RANGES = {
    "weight": (0.0, math.inf, "a finite number of at least 0"),
    "margin": (0.0, math.inf, "a finite number of at least 0"),
    "label_probability": (0.0, 1.0, "a number from 0 to 1"),
    "ranks": (1.0, math.inf, "a finite number, 1 for the best"),
}


def read_row_values(row: Mapping[str, Any], names: Collection[str], num_responses: int, location: str) -> dict[str, Any]:
    """The values `names` of a row, each as `num_responses` floats.

    Raises:
        UserError: where the row lacks one, or has no finite number in its range there.
    """
    values = {}
    for name in sorted(names):
        if name == "score":
            values[name] = tuple(_required(row, side, location) for side in ("chosen_score", "rejected_score"))
        else:
            values[name] = (_required(row, name, location),) * num_responses
    return values


def pair_scores(row: Mapping[str, Any], location: str) -> tuple[float, float]:
    """The scores of a pair that is read as a list: those of the row where it has them, else 1 and 0.

    Raises:
        UserError: for half of them, for no finite numbers, or where the rejected answer has the higher one.
    """
    if all(find_spelling(row, side) is None for side in ("chosen_score", "rejected_score")):
        return 1.0, 0.0
    chosen, rejected = (_required(row, side, location) for side in ("chosen_score", "rejected_score"))
    if chosen < rejected:
        raise UserError(
            f"{location}: `chosen_score` is {chosen:g} and `rejected_score` is {rejected:g}; the chosen answer must not "
            "have the lower score; swap or drop the row"
        )
    return chosen, rejected


def list_scores(row: Mapping[str, Any], num_responses: int, location: str) -> tuple[float, ...]:
    """The scores of a list in the row's order, larger is better: `scores`, or minus `ranks`.

    Raises:
        UserError: where neither or both are there, of another length than the responses, or not finite.
    """
    name = find_spelling(row, "scores")
    if name is None:
        has = ", ".join(row)
        raise UserError(
            f"{location}: the row lacks `scores` and `ranks`; it has {has}. A list says how good each response is: "
            "`scores` (larger is better) or `ranks` (1 is the best); rename with data.columns"
        )
    if name == "scores" and row.get("ranks") is not None:
        raise UserError(
            f"{location}: the row has `scores` and `ranks`; name the one that is meant in data.columns, such as "
            "{scores: scores}"
        )
    values = row[name]
    if not isinstance(values, list | tuple) or len(values) != num_responses:
        length = f"{len(values)} values" if isinstance(values, list | tuple) else f"{values!r:.40}"
        raise UserError(f"{location}: `{name}` has {length} for {num_responses} responses; give each response one number")
    scores = tuple(_number(value, name, f"{name}[{place}]", location) for place, value in enumerate(values))
    return scores if name == "scores" else tuple(-rank for rank in scores)


def read_label(row: Mapping[str, Any], location: str) -> float:
    """1.0 for a desirable answer, 0.0 for an undesirable one.

    Raises:
        UserError: where `label` is neither true nor false (nor 1 nor 0).
    """
    label = row["label"]
    if isinstance(label, int | float) and label in (0, 1):
        return float(label)
    raise UserError(f"{location}: `label` is {label!r:.40}; it must be true (a desirable answer) or false")


def find_spelling(row: Mapping[str, Any], name: str) -> str | None:
    """The spelling under which the row has the field, or None; a field that is null does not count."""
    return next((spelling for spelling in SPELLINGS[name] if row.get(spelling) is not None), None)


def _required(row: Mapping[str, Any], name: str, location: str) -> float:
    """A number under any of its spellings, which must agree where a row has several."""
    found = {
        spelling: _number(row[spelling], name, spelling, location)
        for spelling in SPELLINGS[name]
        if row.get(spelling) is not None
    }
    if not found:
        spellings = " or ".join(f"`{spelling}`" for spelling in SPELLINGS[name])
        raise UserError(
            f"{location}: the row lacks {spellings} (null counts as lacking), which the objective reads of every row; "
            "add it, rename a field to it with data.columns, or drop the row"
        )
    (first, value), *others = found.items()
    for spelling, other in others:
        if other != value:
            raise UserError(
                f"{location}: `{first}` is {value:g} but `{spelling}` is {other:g}; name the one that is meant in "
                f"data.columns, such as {{{name}: {first}}}"
            )
    return value


def _number(value: object, name: str, spelling: str, location: str) -> float:
    low, high, text = _RANGES.get(name, (-math.inf, math.inf, "a finite number"))
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number) and low <= number <= high:
            return number
        if name == "margin" and -math.inf < number < 0:
            raise UserError(
                f"{location}: `{spelling}` is {value!r:.40}; a margin says by how much the chosen answer is better and "
                "cannot be negative; swap or drop the row"
            )
    raise UserError(f"{location}: `{spelling}` is {value!r:.40}; it must be {text}; correct or drop the row")
