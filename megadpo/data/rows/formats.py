"""Recognises a row by its fields: a pair, a labelled answer, a scored list or an example, as text or messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from megadpo.data.rows.messages import (
    Content,
    Message,
    as_messages,
    common_prefix_length,
    is_empty,
    read_content,
    read_template_kwargs,
)
from megadpo.data.rows.scalars import NAMES, find_spelling, list_scores, pair_scores, read_label, read_row_values
from megadpo.errors import UserError

EMPTY = "empty completion"
IDENTICAL = "identical chosen and rejected"
IDENTICAL_LIST = "identical responses"
EQUAL_SCORES = "all scores equal"

_PROMPT_FIELDS = ("prompt", "conversations", "messages")
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_NEEDS = {
    "pairs": "a pair needs `chosen` and `rejected` (and `prompt`, unless they begin with it)",
    "labels": "a labelled answer needs `label` (true or false) and `prompt` with `completion`, or `messages` ending with it",
    "lists": "a list needs `prompt`, `responses`, and `scores` or `ranks`",
    "examples": "an example needs `prompt` with `completion`, or `messages` ending with the answer, or `text`",
}
_LOSS_NEEDS = {
    "pairs": "a pair loss needs `chosen` and `rejected`",
    "labels": "a loss of labelled answers needs `label` with `completion` or `messages`",
    "lists": "a list loss needs `responses` with `scores` or `ranks`",
    "examples": "sft needs `completion`, `messages` or `text`",
}
KINDS = tuple(_NEEDS)


@dataclass(frozen=True)
class Reading:
    """What an objective reads from every row.

    Attributes:
        kind: "pairs" (chosen first), "labels" (answers with a label), "lists" (K >= 2 scored responses, best first) or
            "examples" (one answer).
        row_values: of "margin", "weight", "label_probability" and "score", those that every row must have; "label" and
            "score" come with "labels" and "lists" by themselves.
    """

    kind: str = "pairs"
    row_values: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        assert self.kind in KINDS and self.row_values <= NAMES
        assert "score" not in self.row_values or self.kind in ("pairs", "lists")


PAIRS = Reading()


@dataclass(frozen=True)
class Row:
    """A row in its common form: a prompt with K >= 1 completions, whatever the format it came in.

    Attributes:
        prompts: one for all completions, or one each where they differ; text, or messages where `conversational`.
        completions: K of the prompts' form; of a pair the chosen one first, of a list the best first.
        conversational: True for lists of {"role", "content"} messages.
        template_kwargs: further arguments of the chat template (`tools` and more).
        row_values: name -> K floats: the values of `Reading.row_values`, and "label" or "score" where the kind has it.
        ranked: whether the completions are in the order of their scores, so that these must differ.
    """

    prompts: tuple[Content, ...]
    completions: tuple[Content, ...]
    conversational: bool
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    row_values: dict[str, tuple[float, ...]] = field(default_factory=dict)
    ranked: bool = False

    def reason_to_drop(self) -> str | None:
        """The reason why the row is useless for training, or None."""
        first, *others = self.completions
        if any(is_empty(completion) for completion in self.completions):
            return EMPTY
        if others and len(self.prompts) == 1 and all(other == first for other in others):
            return IDENTICAL if len(others) == 1 else IDENTICAL_LIST
        if self.ranked and len(set(self.row_values["score"])) == 1:
            return EQUAL_SCORES
        return None


def recognise(row: Mapping[str, Any], location: str, reading: Reading = PAIRS) -> Row:
    """Read a row of any supported format as the kind of row that the objective reads.

    Implicit prompts of pairs follow TRL 1.16's `extract_prompt` and `maybe_extract_prompt`, raw hh-rlhf dialogues
    excepted: their prompt ends with the last "\\n\\nAssistant:".

    Args:
        row: the row's fields.
        location: for error messages, such as "pairs.jsonl:17".
        reading: the kind of row, and which values it must have.

    Raises:
        UserError: where fields are missing, of the wrong type or of another kind, or a value is no number or out of range.
    """
    read = {"pairs": _read_pair, "labels": _read_labelled, "lists": _read_list, "examples": _read_example}[reading.kind]
    recognised = read(row, location)
    missing = reading.row_values - recognised.row_values.keys()
    row_values = read_row_values(row, missing, len(recognised.completions), location)
    return replace(recognised, row_values={**recognised.row_values, **row_values}) if row_values else recognised


def _read_pair(row: Mapping[str, Any], location: str) -> Row:
    if not _is_pair(row):
        _refuse(row, "pairs", ("chosen", "rejected"), location)
    return _pair(row, location)


def _read_labelled(row: Mapping[str, Any], location: str) -> Row:
    if _is_pair(row):
        return replace(_pair(row, location), row_values={"label": (1.0, 0.0)})
    if not _has_answer(row) or row.get("label") is None:
        _refuse(row, "labels", ("completion", "label"), location)
    return replace(_answer(row, location), row_values={"label": (read_label(row, location),)})


def _read_list(row: Mapping[str, Any], location: str) -> Row:
    name = find_spelling(row, "responses")
    if _is_pair(row) and (name is None or find_spelling(row, "scores") is None):
        return replace(_pair(row, location), row_values={"score": pair_scores(row, location)}, ranked=True)
    if name is None:
        _refuse(row, "lists", ("responses",), location)
    values = row[name]
    if not isinstance(values, list | tuple) or len(values) < 2:
        has = f"has {len(values)}" if isinstance(values, list | tuple) else f"is {values!r:.40}"
        raise UserError(f"{location}: `{name}` {has}; a list needs at least 2 responses; add some or drop the row")
    scores = list_scores(row, len(values), location)
    best_first = sorted(range(len(values)), key=lambda place: -scores[place])
    unsorted = _with_explicit_prompt(row, [read_content(value, name, location) for value in values], name, location)
    return replace(
        unsorted,
        completions=tuple(unsorted.completions[place] for place in best_first),
        row_values={"score": tuple(scores[place] for place in best_first)},
        ranked=True,
    )


def _read_example(row: Mapping[str, Any], location: str) -> Row:
    if _is_pair(row) and row.get("completion") is None:
        pair = _pair(row, location)
        return replace(pair, prompts=pair.prompts[:1], completions=pair.completions[:1])
    if _has_answer(row):
        return _answer(row, location)
    if row.get("text") is None:
        _refuse(row, "examples", ("completion",), location)
    text = read_content(row["text"], "text", location)
    if not isinstance(text, str):
        raise UserError(f"{location}: `text` must be text, it is {type(row['text']).__name__}; messages go into `messages`")
    return Row(("",), (text,), conversational=False)


def _is_pair(row: Mapping[str, Any]) -> bool:
    return row.get("chosen") is not None and row.get("rejected") is not None


def _has_answer(row: Mapping[str, Any]) -> bool:
    return any(row.get(name) is not None for name in ("completion", "conversations", "messages"))


def _refuse(row: Mapping[str, Any], kind: str, needed: Sequence[str], location: str) -> NoReturn:
    """Raise the UserError for a row that is of another kind than `kind`, or that lacks one of the fields `needed`."""
    half_pair = kind == "pairs" and any(row.get(name) is not None for name in needed)
    what, losses = ("", "") if half_pair else _other_kind(row, kind)
    if what:
        raise UserError(f"{location}: the row is {what}; {_LOSS_NEEDS[kind]}; {losses} such rows")
    missing = [name for name in needed if row.get(name) is None and not (name == "completion" and _has_answer(row))]
    has = ", ".join(row) or "no field at all"
    need = _NEEDS[kind]
    raise UserError(
        f"{location}: the row lacks {' and '.join(f'`{name}`' for name in missing)}; it has {has}. "
        f"{need[0].upper()}{need[1:]}; rename with data.columns"
    )


def _other_kind(row: Mapping[str, Any], kind: str) -> tuple[str, str]:
    """For a row that is not of `kind`: what it is instead, and the losses that read such rows; ("", "") if unknown."""
    name = find_spelling(row, "responses")
    if kind != "lists" and name is not None and isinstance(row[name], list | tuple):
        return f"a list of {len(row[name])} responses", "plackett_luce, all_pairs and best_vs_rest read"
    if kind in ("pairs", "lists") and _has_answer(row):
        if row.get("label") is not None:
            return "one labelled answer", "kto, bco and apo_zero_unpaired read"
        return "one answer without a label", "sft reads"
    if kind != "examples" and row.get("text") is not None:
        return "one text", "sft reads"
    return "", ""


def _pair(row: Mapping[str, Any], location: str) -> Row:
    chosen = read_content(row["chosen"], "chosen", location)
    rejected = read_content(row["rejected"], "rejected", location)
    prompt = _read_prompt(row, location)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError(f"{location}: `chosen` and `rejected` must both be text or both be messages")
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        return _text_pair(prompt, chosen, rejected)
    return _message_pair(prompt, as_messages(chosen), as_messages(rejected), read_template_kwargs(row, location), location)


def _text_pair(prompt: str | None, chosen: str, rejected: str) -> Row:
    if prompt is not None:
        return Row((prompt,), (chosen, rejected), conversational=False)
    if all(_HUMAN in text and _ASSISTANT in text for text in (chosen, rejected)):
        chosen_boundary, rejected_boundary = (text.rindex(_ASSISTANT) + len(_ASSISTANT) for text in (chosen, rejected))
        prompt, other = chosen[:chosen_boundary], rejected[:rejected_boundary]
        prompts = (prompt,) if prompt == other else (prompt, other)
        return Row(prompts, (chosen[chosen_boundary:], rejected[rejected_boundary:]), conversational=False)
    boundary = _implicit_prompt_length(chosen, rejected)
    if (
        0 < boundary < min(len(chosen), len(rejected))
        and chosen[boundary - 1] == " "
        and chosen[boundary] != rejected[boundary]
    ):
        boundary -= 1
    return Row((chosen[:boundary],), (chosen[boundary:], rejected[boundary:]), conversational=False)


def _message_pair(
    prompt: Content | None,
    chosen: list[Message],
    rejected: list[Message],
    template_kwargs: dict[str, Any],
    location: str,
) -> Row:
    if isinstance(prompt, list) and prompt:
        completions = _without_repeated_prompt(prompt, [chosen, rejected])
        return Row((prompt,), completions, True, template_kwargs)
    boundary = _implicit_prompt_length(chosen, rejected)
    if boundary:
        return Row((chosen[:boundary],), (chosen[boundary:], rejected[boundary:]), True, template_kwargs)
    if isinstance(prompt, str) and prompt:
        return Row(([{"role": "user", "content": prompt}],), (chosen, rejected), True, template_kwargs)
    if len(chosen) > 1 and len(rejected) > 1:
        return Row((chosen[:-1], rejected[:-1]), (chosen[-1:], rejected[-1:]), True, template_kwargs)
    raise UserError(f"{location}: no prompt: `chosen` and `rejected` share no leading message; add a `prompt` field")


def _answer(row: Mapping[str, Any], location: str) -> Row:
    """The row with one completion: its `completion`, or the last turn of its conversation."""
    if row.get("completion") is not None:
        return _with_explicit_prompt(row, [read_content(row["completion"], "completion", location)], "completion", location)
    name = "conversations" if row.get("conversations") is not None else "messages"
    turns = _read_conversation(row, name, location)
    if isinstance(turns, str):
        raise UserError(f"{location}: `{name}` must be a list of messages, it is text")
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        problem = f"ends with a turn of {turns[-1]['role']}" if len(turns) > 1 else "has less than two turns"
        raise UserError(
            f"{location}: `{name}` {problem}; its last turn must be the assistant's answer to the turns before it; "
            "correct or drop the row"
        )
    return Row((turns[:-1],), (turns[-1:],), True, read_template_kwargs(row, location))


def _with_explicit_prompt(row: Mapping[str, Any], completions: Sequence[Content], name: str, location: str) -> Row:
    """The row of completions (from the field `name`) with one explicit prompt."""
    prompt = _read_prompt(row, location)
    if prompt is None:
        raise UserError(f"{location}: the row lacks `prompt`, which `{name}` answers; rename with data.columns")
    texts = [completion for completion in completions if isinstance(completion, str)]
    if len(texts) == len(completions) and isinstance(prompt, str):
        return Row((prompt,), tuple(texts), conversational=False)
    if texts and len(texts) < len(completions):
        raise UserError(f"{location}: `{name}` must be all text or all messages")
    if not prompt:
        raise UserError(f"{location}: `prompt` is empty; a conversation needs at least one message before its answer")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answers = _without_repeated_prompt(messages, [as_messages(completion) for completion in completions])
    return Row((messages,), answers, True, read_template_kwargs(row, location))


def _read_prompt(row: Mapping[str, Any], location: str) -> Content | None:
    name = next((name for name in _PROMPT_FIELDS if row.get(name) is not None), None)
    return None if name is None else _read_conversation(row, name, location)


def _read_conversation(row: Mapping[str, Any], name: str, location: str) -> Content:
    """A field of text or messages; the `system` column of a ShareGPT row becomes the first message."""
    turns = read_content(row[name], name, location)
    if name == "conversations" and isinstance(turns, list) and isinstance(row.get("system"), str):
        turns = [{"role": "system", "content": row["system"]}] * bool(row["system"]) + turns
    return turns


def _without_repeated_prompt(prompt: list[Message], completions: list[list[Message]]) -> tuple[list[Message], ...]:
    """The completions without the prompt, which some files repeat in every completion."""
    if all(completion[: len(prompt)] == prompt for completion in completions):
        completions = [completion[len(prompt) :] for completion in completions]
    return tuple(completions)


def _implicit_prompt_length(chosen: Content, rejected: Content) -> int:
    """Length of the common prefix, with at least one item left for each completion (as in TRL's extract_prompt)."""
    return max(min(common_prefix_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1), 0)
