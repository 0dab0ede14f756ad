"""Texts and messages of a row, checked and converted to {"role", "content"}, and its template arguments."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from megadpo.errors import UserError

Message = dict[str, Any]
Content = str | list[Message]

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


def read_content(value: object, name: str, location: str) -> Content:
    """The content of a field: text as it is, messages and ShareGPT turns as {"role", "content"} messages.

    Args:
        value: of the row's field `name`.
        location: for error messages, such as "pairs.jsonl:17".

    Raises:
        UserError: where it is neither text nor messages.
    """
    if isinstance(value, str):
        return _checked_text(value, name, location)
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list | tuple):
        raise UserError(f"{location}: `{name}` must be text or a list of messages, it is {type(value).__name__}")
    return [_read_message(turn, name, location) for turn in turns]


def as_messages(content: Content) -> list[Message]:
    """A completion as messages: text becomes an assistant message."""
    return [{"role": "assistant", "content": content}] if isinstance(content, str) else content


def is_empty(content: Content) -> bool:
    """True where a completion has nothing but white space."""
    if isinstance(content, str):
        return not content.strip()
    return all(not message.get("tool_calls") and not _text_of(message.get("content")) for message in content)


def read_template_kwargs(row: Mapping[str, Any], location: str) -> dict[str, Any]:
    """The template's arguments other than the messages: `tools` and all of `chat_template_kwargs`.

    Both may be JSON text; so may each tool be.

    Raises:
        UserError: where they are no JSON, of the wrong type, or set how a conversation is tokenised.
    """
    kwargs = _decoded(row.get("chat_template_kwargs"), "chat_template_kwargs", location)
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise UserError(f"{location}: `chat_template_kwargs` must be an object of names and values, it is {kwargs!r:.40}")
    reserved = [name for name in kwargs or {} if name in _reserved_names()]
    if reserved:
        raise UserError(
            f"{location}: `chat_template_kwargs` may not set {reserved[0]!r}, only what the template reads by name "
            "(tools go into `tools`)"
        )
    tools = _decoded(row.get("tools"), "tools", location)
    if tools is None:
        return dict(kwargs or {})
    if isinstance(tools, list):
        tools = [_decoded(tool, "tools", location) for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(f"{location}: `tools` must be a list of objects, one a tool (or its JSON text), it is {tools!r:.60}")
    return {**(kwargs or {}), "tools": tools}


@cache
def _reserved_names() -> frozenset[str]:
    """Parameters of the tokenizer and its renderer, which rows may not set: they would change how rows are tokenised."""
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_template_utils import render_jinja_template

    functions = (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template)
    names = {name for function in functions for name in inspect.signature(function).parameters}
    return frozenset(names - {"self", "kwargs", "documents"} | {"messages"})


def _read_message(turn: object, name: str, location: str) -> Message:
    if isinstance(turn, Mapping) and "from" in turn and "value" in turn:
        message = {"role": _ROLES.get(str(turn["from"]).lower()), "content": turn["value"]}
        if message["role"] is None:
            raise UserError(f"{location}: `{name}` has a turn from {turn['from']!r}; known: {', '.join(_ROLES)}")
    elif isinstance(turn, Mapping) and isinstance(turn.get("role"), str):
        # Arrow fills the keys that only other messages have with None.
        message = {key: value for key, value in turn.items() if value is not None or key == "content"}
    else:
        raise UserError(f'{location}: `{name}` has a message without "role" and "content" (or "from" and "value")')
    if "tool_calls" in message:
        message["tool_calls"] = _read_tool_calls(message["tool_calls"], name, location)
    content = message.get("content")
    if isinstance(content, str):
        _checked_text(content, name, location)
    elif not isinstance(content, list) and not (content is None and message.get("tool_calls")):
        raise UserError(f"{location}: a message of `{name}` has no text as its content but {content!r:.40}")
    return message


def _read_tool_calls(value: object, name: str, location: str) -> list[Any]:
    """The calls as the template gets them; their arguments are left as they are, an object or JSON text."""
    calls = _decoded(value, f"tool_calls` of `{name}", location)
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise UserError(f"{location}: `tool_calls` of a message of `{name}` must be a list of objects, it is {calls!r:.60}")
    return calls


def _decoded(value: object, name: str, location: str) -> Any:
    """A value, decoded where it is JSON text; None for blank text."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{location}: `{name}` is no valid JSON: {error}") from error


def _checked_text(text: str, name: str, location: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{location}: `{name}` has half a surrogate pair at character {error.start}; it is no Unicode text"
        ) from error
    return text


def _text_of(content: object) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in content).strip()
    return str(content or "").strip()


def common_prefix_length(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """Length of the longest common prefix of two sequences (of characters, messages or ids)."""
    same, end = 0, min(len(ours), len(theirs))
    if ours[:end] == theirs[:end]:
        return end
    # Binary search: comparing slices is much faster than comparing items one by one.
    while end - same > 1:
        middle = (same + end) // 2
        if ours[same:middle] == theirs[same:middle]:
            same = middle
        else:
            end = middle
    return same
