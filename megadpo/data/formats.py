"""Recognises what a row is by its fields: standard or conversational, with an explicit or an implicit prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megadpo.errors import UserError

Message = dict[str, Any]
Content = str | list[Message]

_PROMPT_FIELDS = ("prompt", "conversations", "messages")
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
}
# A row may set what its template sees, never how it is tokenised.
_RESERVED_KWARGS = ("tokenize", "return_dict", "return_tensors", "add_generation_prompt", "continue_final_message")


@dataclass(frozen=True)
class PreferenceRow:
    """A preference pair, its format no longer of interest.

    Attributes:
        prompt: text, or messages where `conversational`.
        chosen: the preferred completion, in the prompt's form.
        rejected: the other completion.
        conversational: True for lists of {"role", "content"} messages.
        rejected_prompt: where the two sides do not share their prompt (some implicit ones), the rejected side's.
        template_kwargs: what the row hands to its chat template (`tools` and more).
    """

    prompt: Content
    chosen: Content
    rejected: Content
    conversational: bool
    rejected_prompt: Content | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def has_empty_completion(self) -> bool:
        """True where a completion has nothing but white space."""
        return _is_empty(self.chosen) or _is_empty(self.rejected)

    @property
    def is_identical(self) -> bool:
        """True where both sides say the same to the same prompt."""
        return self.chosen == self.rejected and self.rejected_prompt is None


def recognise(row: Mapping[str, Any], location: str) -> PreferenceRow:
    """Read a row of any supported format.

    Implicit prompts follow TRL 1.16's `extract_prompt` and `maybe_extract_prompt`, raw hh-rlhf dialogues excepted:
    their prompt ends with the last "\\n\\nAssistant:".

    Args:
        row: the row's fields.
        location: for error messages, such as "pairs.jsonl:17".

    Raises:
        UserError: where fields are missing or of the wrong type.
    """
    missing = [name for name in ("chosen", "rejected") if row.get(name) is None]
    if missing:
        has = ", ".join(row) or "no field at all"
        raise UserError(
            f"{location}: the row lacks {' and '.join(f'`{name}`' for name in missing)}; it has {has}. "
            "A pair needs `chosen` and `rejected` (and `prompt`, unless they begin with it); rename with data.columns"
        )
    prompt_field = next((name for name in _PROMPT_FIELDS if row.get(name) is not None), None)
    chosen = _read_side(row["chosen"], "chosen", location)
    rejected = _read_side(row["rejected"], "rejected", location)
    prompt = None if prompt_field is None else _read_side(row[prompt_field], prompt_field, location)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError(f"{location}: `chosen` and `rejected` must both be text or both be messages")
    if prompt_field == "conversations" and isinstance(prompt, list) and isinstance(row.get("system"), str):
        prompt = [{"role": "system", "content": row["system"]}] * bool(row["system"]) + prompt
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        return _text_row(prompt, chosen, rejected)
    return _message_row(prompt, _as_messages(chosen), _as_messages(rejected), _template_kwargs(row, location), location)


def _text_row(prompt: str | None, chosen: str, rejected: str) -> PreferenceRow:
    if prompt is not None:
        return PreferenceRow(prompt, chosen, rejected, conversational=False)
    if all(_HUMAN in side and _ASSISTANT in side for side in (chosen, rejected)):
        cut_chosen, cut_rejected = (side.rindex(_ASSISTANT) + len(_ASSISTANT) for side in (chosen, rejected))
        prompt, other = chosen[:cut_chosen], rejected[:cut_rejected]
        return PreferenceRow(
            prompt,
            chosen[cut_chosen:],
            rejected[cut_rejected:],
            conversational=False,
            rejected_prompt=other if other != prompt else None,
        )
    cut = _implicit_prompt_length(chosen, rejected)
    if 0 < cut < min(len(chosen), len(rejected)) and chosen[cut - 1] == " " and chosen[cut] != rejected[cut]:
        cut -= 1
    return PreferenceRow(chosen[:cut], chosen[cut:], rejected[cut:], conversational=False)


def _message_row(
    prompt: Content | None,
    chosen: list[Message],
    rejected: list[Message],
    template_kwargs: dict[str, Any],
    location: str,
) -> PreferenceRow:
    rejected_prompt = None
    if isinstance(prompt, list) and prompt:
        # Some files repeat the whole prompt on both sides.
        if chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt:
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    else:
        cut = _implicit_prompt_length(chosen, rejected)
        if cut:
            prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
        elif prompt:
            prompt = [{"role": "user", "content": prompt}]
        elif len(chosen) > 1 and len(rejected) > 1:
            prompt, rejected_prompt = chosen[:-1], rejected[:-1]
            chosen, rejected = chosen[-1:], rejected[-1:]
        else:
            raise UserError(f"{location}: no prompt: `chosen` and `rejected` share no leading message; add a `prompt` field")
    assert isinstance(prompt, list)
    return PreferenceRow(prompt, chosen, rejected, True, rejected_prompt, template_kwargs)


def first_difference(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """Number of leading items (characters, messages, ids) that both sequences have."""
    shorter = min(len(ours), len(theirs))
    if ours[:shorter] == theirs[:shorter]:
        return shorter
    return next(index for index in range(shorter) if ours[index] != theirs[index])


def _implicit_prompt_length(chosen: Content, rejected: Content) -> int:
    """The common beginning, of which the shorter side keeps its last item as a completion (as TRL's extract_prompt)."""
    return max(min(first_difference(chosen, rejected), len(chosen) - 1, len(rejected) - 1), 0)


def _as_messages(side: Content) -> list[Message]:
    return [{"role": "assistant", "content": side}] if isinstance(side, str) else side


def _read_side(value: object, name: str, location: str) -> Content:
    """Text as it is, messages and ShareGPT turns as {"role", "content"} messages."""
    if isinstance(value, str):
        return _checked_text(value, name, location)
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list | tuple):
        raise UserError(f"{location}: `{name}` must be text or a list of messages, it is {type(value).__name__}")
    return [_read_message(turn, name, location) for turn in turns]


def _read_message(turn: object, name: str, location: str) -> Message:
    if isinstance(turn, Mapping) and "from" in turn and "value" in turn:
        message = {"role": _ROLES.get(str(turn["from"]).lower()), "content": turn["value"]}
        if message["role"] is None:
            raise UserError(f"{location}: `{name}` has a turn from {turn['from']!r}; known: {', '.join(_ROLES)}")
    elif isinstance(turn, Mapping) and isinstance(turn.get("role"), str):
        # Arrow fills the keys that only other rows have with None.
        message = {key: value for key, value in turn.items() if value is not None or key == "content"}
    else:
        raise UserError(f'{location}: `{name}` has a message without "role" and "content" (or "from" and "value")')
    content = message.get("content")
    if isinstance(content, str):
        _checked_text(content, name, location)
    elif not isinstance(content, list) and not (content is None and message.get("tool_calls")):
        raise UserError(f"{location}: a message of `{name}` has no text as its content but {content!r:.40}")
    return message


def _checked_text(text: str, name: str, location: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{location}: `{name}` has half a surrogate pair at character {error.start}; it is no Unicode text"
        ) from error
    return text


def _template_kwargs(row: Mapping[str, Any], location: str) -> dict[str, Any]:
    """What TRL hands to the template from a row: `tools` (maybe as JSON text) and `chat_template_kwargs`."""
    kwargs = dict(row.get("chat_template_kwargs") or {})
    reserved = [name for name in kwargs if name in _RESERVED_KWARGS]
    if reserved:
        raise UserError(f"{location}: chat_template_kwargs may not set {reserved[0]!r}")
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise UserError(f"{location}: `tools` is no valid JSON: {error}") from error
    return {**kwargs, **({"tools": tools} if tools else {})}


def _is_empty(side: Content) -> bool:
    if isinstance(side, str):
        return not side.strip()
    return all(not message.get("tool_calls") and not _text_of(message.get("content")) for message in side)


def _text_of(content: object) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in content).strip()
    return str(content or "").strip()
