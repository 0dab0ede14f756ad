"""The columns of well-known data sets under our names: Alpaca's, Orca's, UltraFeedback's, HelpSteer's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megadpo.data.rows.scalars import SPELLINGS
from megadpo.errors import UserError

Fields = dict[str, Any]

QUESTIONS = ("instruction", "question", "query", "input", "context")
"""Columns that hold the prompt where there is none under our names, the first of them that a row has."""
ANSWERS = ("output", "response", "answer")
"""Columns that hold the one answer to a prompt."""
SIDES = {"chosen": ("chosen_response",), "rejected": ("rejected_response",)}
COMPARED = (("response_1", "response_2", "preference_strength"), ("response1", "response2", "overall_preference"))
"""HelpSteer's two answers and how much better the second is; below 0 the first is better."""
MEDIA = ("images", "image", "videos", "video", "audios", "audio")

_PROMPTS = ("prompt", "conversations", "messages")
_OURS = {
    *_PROMPTS,
    *("chosen", "rejected", "completion", "label", "text", "system", "tools", "chat_template_kwargs"),
    *(spelling for spellings in SPELLINGS.values() for spelling in spellings),
}


@dataclass(frozen=True)
class Translated:
    """A row under our names.

    Attributes:
        row: its fields.
        question: its prompt, where that came as text under another name than ours.
        unread: columns with text that nothing reads.
        has_no_preference: whether the row says that neither of its two answers is better.
    """

    row: Fields
    question: str | None = None
    unread: tuple[str, ...] = ()
    has_no_preference: bool = field(default=False)


def translate(row: Mapping[str, Any], location: str) -> Translated:
    """The row with the columns of well-known data sets renamed, split or joined; our own names win.

    Raises:
        UserError: where it has images, sound or video, or a comparison without a number.
    """
    media = next((name for name in MEDIA if row.get(name) not in (None, "", [], {})), None)
    if media is not None:
        raise UserError(
            f"{location}: the row has `{media}`; only text is read, and an answer about what is not seen teaches "
            "nothing: drop the row, or name the column in data.ignore_columns"
        )
    ours = dict(row)
    _system(ours)
    _sides(ours)
    has_no_preference = _compared(ours, location)
    _responses(ours)
    question = _prompt(ours, location)
    _answer(ours)
    unread = tuple(name for name, value in ours.items() if name not in _OURS and _has_text(value))
    return Translated(ours, question, unread, has_no_preference)


def _has_text(value: Any, levels: int = 5) -> bool:
    if isinstance(value, Mapping | list | tuple) and levels:
        return any(_has_text(item, levels - 1) for item in (value.values() if isinstance(value, Mapping) else value))
    return isinstance(value, str) and bool(value.strip())


def _system(row: Fields) -> None:
    if "system" not in row and "system_prompt" in row:
        row["system"] = row.pop("system_prompt")


def _sides(row: Fields) -> None:
    for ours, names in SIDES.items():
        name = next((name for name in names if row.get(name) is not None), None)
        if row.get(ours) is None and name is not None:
            row[ours] = row.pop(name)


def _compared(row: Fields, location: str) -> bool:
    """HelpSteer's two answers as chosen and rejected; True where neither is better."""
    for first, second, preference in COMPARED:
        if any(row.get(name) is None for name in (first, second, preference)) or row.get("chosen") is not None:
            continue
        value = row.pop(preference)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(
                f"{location}: `{preference}` is {value!r:.40}; it must be a number, below 0 where `{first}` is the "
                "better one"
            )
        better, worse = (first, second) if value < 0 else (second, first)
        row["chosen"], row["rejected"] = row.pop(better), row.pop(worse)
        return value == 0
    return False


def _responses(row: Fields) -> None:
    """UltraFeedback's `completions`, objects with a response and its score, as responses and scores."""
    listed = row.get("completions")
    if row.get("responses") is not None or not isinstance(listed, list | tuple) or not listed:
        return
    if not all(isinstance(item, Mapping) and "response" in item for item in listed):
        return
    del row["completions"]
    row["responses"] = [item["response"] for item in listed]
    if row.get("scores") is None and row.get("ranks") is None:
        row["scores"] = [item.get("overall_score") for item in listed]


def _prompt(row: Fields, location: str) -> str | None:
    """Makes a user's message of the question, which ends without white space before its answer; returns it."""
    name = next((name for name in QUESTIONS if row.get(name) not in (None, "")), None)
    if name is None or any(row.get(ours) is not None for ours in _PROMPTS) or _brings_its_prompt(row):
        return None
    question = row[name]
    if not isinstance(question, str | list | tuple) or (name == "context") != isinstance(question, list | tuple):
        return None
    del row[name]
    extra = row.get("input")
    if name == "instruction" and extra not in (None, [], {}):
        if not isinstance(extra, str):
            raise UserError(f"{location}: `input` must be text, it is {type(extra).__name__}; correct or drop the row")
        del row["input"]
        question = f"{question}\n{extra}" if extra.strip() else question
    row["prompt"] = question
    if not isinstance(question, str):
        return None
    earlier = row.get("history")
    turns = []
    if isinstance(earlier, list | tuple) and _is_history(earlier):
        del row["history"]
        turns = [{"role": role, "content": text} for turn in earlier for role, text in zip(_ROLES, turn, strict=True)]
    row["prompt"] = [*turns, {"role": "user", "content": question}]
    return question


_ROLES = ("user", "assistant")


def _is_history(turns: Sequence[Any]) -> bool:
    return bool(turns) and all(isinstance(turn, list | tuple) and len(turn) == len(_ROLES) for turn in turns)


def _brings_its_prompt(row: Fields) -> bool:
    """Whether both sides are whole conversations, which begin with their prompt."""
    sides = [row.get(name) for name in ("chosen", "rejected")]
    if all(isinstance(side, str) for side in sides):
        return all("\n\nHuman:" in side and "\n\nAssistant:" in side for side in sides)  # type: ignore[operator]
    return all(isinstance(side, list | tuple) and _asks(side) for side in sides)


def _asks(side: Any) -> bool:
    first = side[0] if side else None
    said = (first.get("role") or first.get("from")) if isinstance(first, Mapping) else None
    return isinstance(said, str) and said.lower() in ("user", "human", "system", "developer")


def _answer(row: Fields) -> None:
    name = next((name for name in ANSWERS if row.get(name) is not None), None)
    if name is None or any(
        row.get(ours) is not None for ours in (*_PROMPTS[1:], "completion", "chosen", "responses", "text")
    ):
        return
    if row.get("prompt") is not None:
        row["completion"] = row.pop(name)
