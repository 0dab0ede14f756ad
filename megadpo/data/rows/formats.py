"""Recognises a row by its fields: a pair, a labelled answer, a scored list or an example, as text or messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from megadpo.data.rows.columns import translate
from megadpo.data.rows.messages import (
    Content,
    Message,
    as_messages,
    check_answer,
    check_turn,
    common_prefix_length,
    is_empty,
    read_content,
    read_template_kwargs,
    read_text,
)
from megadpo.data.rows.scalars import NAMES, find_spelling, list_scores, pair_scores, read_label, read_row_values
from megadpo.errors import UserError

EMPTY = "empty completion"
IDENTICAL = "identical chosen and rejected"
IDENTICAL_LIST = "identical responses"
EQUAL_SCORES = "all scores equal"
NO_PREFERENCE = "neither answer preferred"

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
        has_no_preference: whether the row says that no completion is better than the others.
        implicit_prompt: whether the prompt is the common beginning of two texts.
        unread: columns with text that nothing has read.
        plain: the same as text, for tokenizers without a chat template; only of a question and its answers from columns
            under other names than ours, which do not say whether they are conversations.
    """

    prompts: tuple[Content, ...]
    completions: tuple[Content, ...]
    conversational: bool
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    row_values: dict[str, tuple[float, ...]] = field(default_factory=dict)
    ranked: bool = False
    has_no_preference: bool = False
    implicit_prompt: bool = field(default=False, compare=False)
    unread: tuple[str, ...] = field(default=(), compare=False)
    plain: Row | None = field(default=None, compare=False)

    def reason_to_drop(self) -> str | None:
        """The reason why the row is useless for training, or None."""
        first, *others = self.completions
        if any(is_empty(completion) for completion in self.completions):
            return EMPTY
        if others and len(self.prompts) == 1 and all(other == first for other in others):
            return IDENTICAL if len(others) == 1 else IDENTICAL_LIST
        if self.has_no_preference:
            return NO_PREFERENCE
        if self.ranked and len(set(self.row_values["score"])) == 1:
            return EQUAL_SCORES
        return None

    @property
    def has_empty_prompt(self) -> bool:
        """Whether an answer stands without a prompt."""
        return not all(self.prompts)


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
        return _text_pair(prompt, chosen, rejected)
    sides = as_messages(chosen), as_messages(rejected)
    whole = _message_pair(prompt, *sides, location)
    prompts = tuple(_with_system(row, messages, location) for messages in map(as_messages, whole.prompts))
    if all(whole.completions):
        for name, answer in zip(("chosen", "rejected"), map(as_messages, whole.completions), strict=True):
            check_answer(answer, name, location)
            check_turn(prompts[0 if name == "chosen" else -1], [answer], location)
    return replace(whole, prompts=prompts, template_kwargs=read_template_kwargs(row, location))


def _text_pair(prompt: str | None, chosen: str, rejected: str) -> Row:
    if prompt is not None:
        return Row((prompt,), (chosen, rejected), conversational=False)
    if all(_HUMAN in text and _ASSISTANT in text for text in (chosen, rejected)):
        chosen_boundary, rejected_boundary = (text.rindex(_ASSISTANT) + len(_ASSISTANT) for text in (chosen, rejected))
        prompt, other = chosen[:chosen_boundary], rejected[:rejected_boundary]
        prompts = (prompt,) if prompt == other else (prompt, other)
        return Row(prompts, (chosen[chosen_boundary:], rejected[rejected_boundary:]), conversational=False)
    boundary = 0 if chosen == rejected else _common_words_length(chosen, rejected)
    return Row((chosen[:boundary],), (chosen[boundary:], rejected[boundary:]), False, implicit_prompt=True)


def _common_words_length(chosen: str, rejected: str) -> int:
    """Length of the common beginning of two texts, without a word that goes on in one of them and without a last space.

    Of a text that is the beginning of the other all is common: its answer is empty.
    """
    end = common_prefix_length(chosen, rejected)
    if end == min(len(chosen), len(rejected)):
        return end
    if _in_word(chosen[end]) or _in_word(rejected[end]):
        while end and _in_word(chosen[end - 1]):
            end -= 1
    return end - (end > 0 and chosen[end - 1] == " ")


def _in_word(character: str) -> bool:
    """Whether the character is of a word in a script that puts spaces between words."""
    spaced = character < "\u0e00" or "\u1e00" <= character < "\u2000" or "\uac00" <= character < "\ud7b0"
    return spaced and character.isalnum()


def _message_pair(prompt: Content | None, chosen: list[Message], rejected: list[Message], location: str) -> Row:
    if isinstance(prompt, list) and prompt:
        return Row((prompt,), _without_repeated_prompt(prompt, [chosen, rejected]), True)
    if isinstance(prompt, str) and prompt:
        if not all(side and side[0]["role"] in _ASKING for side in (chosen, rejected)):
            return Row(([{"role": "user", "content": prompt}],), (chosen, rejected), True)
        _check_same_question(prompt, chosen, location)
    same = common_prefix_length(chosen, rejected)
    if same == min(len(chosen), len(rejected)) and same:
        # One is the beginning of the other, so its answer is empty; where they are the same they share all but the answer.
        same -= len(chosen) == len(rejected)
        return Row((chosen[:same],), (chosen[same:], rejected[same:]), True)
    cuts = [_answer_start(side, name, location) for name, side in (("chosen", chosen), ("rejected", rejected))]
    if same >= max(cuts) and same:
        if chosen[same - 1]["role"] == "assistant" and not chosen[same - 1].get("tool_calls"):
            raise UserError(
                f"{location}: `chosen` and `rejected` have two turns of the assistant in a row, of which the first is the "
                "same; join them in one message or drop the row"
            )
        return Row((chosen[:same],), (chosen[same:], rejected[same:]), True)
    if not all(cuts):
        raise UserError(f"{location}: no prompt: `chosen` and `rejected` share no leading message; add a `prompt` field")
    return Row((chosen[: cuts[0]], rejected[: cuts[1]]), (chosen[cuts[0] :], rejected[cuts[1] :]), True)


_ASKING = ("user", "system", "developer")


def _answer_start(side: list[Message], name: str, location: str) -> int:
    """Where the answer of a whole conversation begins: after the last turn that is not the assistant's (or a tool's)."""
    if side and side[-1]["role"] != "assistant":
        check_answer(side[-1:], name, location)
    return max((place + 1 for place, message in enumerate(side) if message["role"] in _ASKING), default=0)


def _check_same_question(prompt: str, chosen: list[Message], location: str) -> None:
    """A text prompt beside whole conversations must be what these ask, or it would go unread."""
    asked = [str(message.get("content") or "").strip() for message in chosen if message["role"] in _ASKING]
    if not any(prompt.strip() in text or (text and text in prompt) for text in asked):
        raise UserError(
            f"{location}: `prompt` is another text than what is asked in `chosen`, which begins with its own prompt; remove "
            "one of them, or name `prompt` in data.ignore_columns"
        )


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
    answers = _without_repeated_prompt(messages, [as_messages(completion) for completion in completions])
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


def _without_repeated_prompt(prompt: list[Message], completions: list[list[Message]]) -> tuple[list[Message], ...]:
    """The completions without the prompt, with or without its system message, which some files repeat in each of them."""
    for repeated in (prompt, prompt[1:] if prompt[0]["role"] == "system" else []):
        if repeated and all(completion[: len(repeated)] == repeated for completion in completions):
            return tuple(completion[len(repeated) :] for completion in completions)
    return tuple(completions)
