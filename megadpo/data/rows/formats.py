"""Recognises a row by its fields: a pair, a labelled answer, a scored list or an example, as text or messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from megadpo.data.rows.columns import translate
from megadpo.data.rows.messages import (
    Content,
    Message,
    as_messages,
    check_answer,
    check_turn,
    read_content,
    read_template_kwargs,
    read_text,
)
from megadpo.data.rows.pairs import message_pair, text_pair, without_repeated_prompt
from megadpo.data.rows.row import Row
from megadpo.data.rows.scalars import NAMES, find_spelling, list_scores, pair_scores, read_label, read_row_values
from megadpo.errors import UserError

_PROMPT_FIELDS = ("prompt", "conversations", "messages")
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


def recognise(row: Mapping[str, Any], location: str, reading: Reading = PAIRS, allow_no_prompt: bool = False) -> Row:
    """Read a row of any supported format as the kind of row that the objective reads.

    Without a prompt, that of two texts is their common beginning in whole words, of raw hh-rlhf dialogues all up to the last
    "\\n\\nAssistant:", and of two conversations their common turns, or each one's own up to its last user turn.

    Args:
        row: the row's fields.
        location: for error messages, such as "pairs.jsonl:17".
        reading: the kind of row, and which values it must have.
        allow_no_prompt: take two texts without prompt and common beginning as answers to nothing.

    Raises:
        UserError: where fields are missing, of the wrong type or of another kind, a value is no number or out of range, an
            answer is not the assistant's, or two texts are left without a prompt.
    """
    translated = translate(row, location)
    row = translated.row
    read = {"pairs": _read_pair, "labels": _read_labelled, "lists": _read_list, "examples": _read_example}[reading.kind]
    recognised = read(row, location)
    is_blank = recognised.implicit_prompt and not recognised.prompts[0]
    if is_blank and not allow_no_prompt and recognised.reason_to_drop() is None:
        _refuse_without_prompt(translated.unread, location)
    missing = reading.row_values - recognised.row_values.keys()
    row_values = read_row_values(row, missing, len(recognised.completions), location)
    recognised = replace(
        recognised,
        row_values={**recognised.row_values, **row_values},
        has_no_preference=translated.has_no_preference,
        unread=translated.unread,
    )
    return replace(recognised, plain=_as_text(recognised, translated.question))


def _as_text(row: Row, question: str | None) -> Row | None:
    """The row with a line for its question and its answers after it, where it is no more than these."""
    if question is None or row.prompts != ([{"role": "user", "content": question}],):
        return None
    answers = [message for answer in row.completions for message in as_messages(answer)]
    if len(answers) != len(row.completions) or not all(isinstance(answer.get("content"), str) for answer in answers):
        return None
    texts = tuple(answer["content"] for answer in answers)
    return replace(row, prompts=(f"{question}\n",), completions=texts, conversational=False)


def _refuse_without_prompt(unread: Sequence[str], location: str) -> NoReturn:
    nobody = f"nothing reads {', '.join(f'`{name}`' for name in unread)}" if unread else "there is no other column with text"
    example = f", such as {{prompt: {unread[0]}}}" if unread else ""
    raise UserError(
        f"{location}: the row has no `prompt`, and `chosen` and `rejected` have no common beginning; {nobody}; name the "
        f"prompt's column in data.columns{example}, or set data.allow_no_prompt: true where there is none"
    )


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
        if pair.conversational:  # of a pair with an empty side nothing was checked
            check_answer(as_messages(pair.completions[0]), "chosen", location)
        return replace(pair, prompts=pair.prompts[:1], completions=pair.completions[:1])
    if _has_answer(row):
        return _answer(row, location)
    text = row.get("text")
    if text is None:
        _refuse(row, "examples", ("completion",), location)
    if not isinstance(text, str):
        raise UserError(f"{location}: `text` must be text, it is {type(text).__name__}; messages go into `messages`")
    return Row(("",), (read_text(text, "text", location),), conversational=False)


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
        return text_pair(prompt, chosen, rejected, location)
    sides = as_messages(chosen), as_messages(rejected)
    whole = message_pair(prompt, *sides, location)
    prompts = tuple(_with_system(row, messages, location) for messages in map(as_messages, whole.prompts))
    if all(whole.completions):
        for name, answer in zip(("chosen", "rejected"), map(as_messages, whole.completions), strict=True):
            check_answer(answer, name, location)
            check_turn(prompts[0 if name == "chosen" else -1], [answer], location)
    return replace(whole, prompts=prompts, template_kwargs=read_template_kwargs(row, location))


def _answer(row: Mapping[str, Any], location: str) -> Row:
    """The row with one completion: its `completion`, or the last turn of its conversation."""
    if row.get("completion") is not None:
        return _with_explicit_prompt(row, [read_content(row["completion"], "completion", location)], "completion", location)
    name = "conversations" if row.get("conversations") is not None else "messages"
    turns = _read_conversation(row, name, location)
    assert not isinstance(turns, str)
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        problem = f"ends with a turn of {turns[-1]['role']}" if len(turns) > 1 else "has less than two turns"
        raise UserError(
            f"{location}: `{name}` {problem}; its last turn must be the assistant's answer to the turns before it; "
            "correct or drop the row"
        )
    if turns[-2]["role"] == "assistant" and not turns[-2].get("tool_calls"):
        raise UserError(
            f"{location}: `{name}` ends with two turns of the assistant in a row; join them in one message or drop the row"
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
    answers = without_repeated_prompt(messages, [as_messages(completion) for completion in completions])
    for answer in answers:
        check_answer(answer, name, location)
    check_turn(messages, answers, location)
    return Row((messages,), answers, True, read_template_kwargs(row, location))


def _read_prompt(row: Mapping[str, Any], location: str) -> Content | None:
    name = next((name for name in _PROMPT_FIELDS if row.get(name) is not None), None)
    return None if name is None else _read_conversation(row, name, location)


def _read_conversation(row: Mapping[str, Any], name: str, location: str) -> Content:
    """A field of text or messages; a `system` column becomes the first message, and the text after it the user's."""
    turns = read_content(row[name], name, location)
    if isinstance(turns, str):
        if name != "prompt":
            raise UserError(f"{location}: `{name}` must be a list of messages, it is text")
        # Whether a row has the column decides, not whether it is empty there: all rows of a file are then conversations.
        if "system" not in row or not turns:
            return turns
        turns = [{"role": "user", "content": turns}]
    return _with_system(row, turns, location)


def _with_system(row: Mapping[str, Any], turns: list[Message], location: str) -> list[Message]:
    """The turns with the row's `system` text before them, unless they begin with it."""
    text = row.get("system")
    if text is None or text == "" or not turns:
        return turns
    if not isinstance(text, str):
        raise UserError(f"{location}: `system` must be text, it is {type(text).__name__}")
    system = {"role": "system", "content": read_text(text, "system", location)}
    if turns[0]["role"] not in ("system", "developer"):
        return [system, *turns]
    if turns[0].get("content") != text:
        raise UserError(f"{location}: `system` is another text than the system message of the conversation; remove one")
    return turns
