"""Texts and messages of a row, checked and converted to {"role", "content"}, and its template arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from megadpo.data.rows.json_text import is_too_deep, parse_json
from megadpo.errors import UserError

Message = dict[str, Any]
Content = str | list[Message]

MAX_CHARACTERS = 10_000_000
"""Of a text or a conversation: several times what the longest context of any model holds."""

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
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_MEDIA = ("image", "image_url", "images", "audio", "audio_url", "input_audio", "video", "video_url", "file")
_OBJECTS = re.compile(r"\s*(\[\s*)?\{")
_PRINTED = (("role", "content"), ("from", "value"), ("type", "text"))
_REASONING = ("reasoning_content", "reasoning", "thinking")


def read_content(value: object, name: str, location: str) -> Content:
    """The content of a field: text as it is, messages and ShareGPT turns as {"role", "content"} messages.

    Messages may come as JSON text.

    Args:
        value: of the row's field `name`.
        location: for error messages, such as "pairs.jsonl:17".

    Raises:
        UserError: where it is neither text nor messages, or longer than `MAX_CHARACTERS`.
    """
    if isinstance(value, str):
        decoded = _encoded_messages(value, name, location)
        if decoded is None:
            return read_text(value, name, location)
        value = decoded
    if isinstance(value, Mapping) and value.get("role") is None and value.get("from") is None:
        keys = ", ".join(map(str, value)) or "nothing"
        raise UserError(f"{location}: `{name}` must be text or a list of messages, it is an object of {keys:.60}")
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list | tuple):
        raise UserError(f"{location}: `{name}` must be text or a list of messages, it is {type(value).__name__}")
    messages = [_read_message(turn, name, location) for turn in turns]
    _check_length(sum(len(_text_of(message)) for message in messages), name, location)
    return messages


def read_text(text: str, name: str, location: str) -> str:
    """A text, checked: Unicode, and no longer than `MAX_CHARACTERS`.

    Raises:
        UserError: where it is not.
    """
    _check_length(len(text), name, location)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{location}: `{name}` has half a surrogate pair at character {error.start}; it is no Unicode text"
        ) from error
    return text


def _check_length(num_characters: int, name: str, location: str) -> None:
    if num_characters > MAX_CHARACTERS:
        raise UserError(
            f"{location}: `{name}` has {num_characters:,} characters; at most {MAX_CHARACTERS:,} are read; shorten or drop "
            "the row"
        )


def _encoded_messages(text: str, name: str, location: str) -> list[Any] | None:
    """The messages that a text is the JSON of, as csv files and some columns have them; None for any other text."""
    if not _OBJECTS.match(text) or len(text) > MAX_CHARACTERS:
        return None
    if any(all(f"'{key}':" in text for key in keys) for keys in _PRINTED) and text.lstrip("[ \n{").startswith("'"):
        raise UserError(
            f"{location}: `{name}` holds messages as Python prints them ({text[:30]!r}…); store the list itself or its JSON"
        )
    try:
        decoded = parse_json(text)
    except ValueError:
        return None
    turns = [decoded] if isinstance(decoded, Mapping) else decoded
    is_messages = all(
        isinstance(turn, Mapping) and ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys())
        for turn in turns
    )
    return turns if is_messages else None


def as_messages(content: Content) -> list[Message]:
    """A completion as messages: text becomes an assistant message."""
    return [{"role": "assistant", "content": content}] if isinstance(content, str) else content


def is_empty(content: Content) -> bool:
    """True where a completion has nothing but white space."""
    if isinstance(content, str):
        return not content.strip()
    return all(not message.get("tool_calls") and not _text_of(message).strip() for message in content)


def _text_of(message: Message) -> str:
    return message.get("content") or ""


def check_answer(answer: list[Message], name: str, location: str) -> None:
    """An answer is what the assistant says, and the results of tools that it called in between: all of it is learned.

    Raises:
        UserError: where someone else speaks in it, it ends with a tool, or has two turns of the assistant in a row.
    """
    speakers = [message["role"] for message in answer]
    other = next((role for role in speakers if role not in ("assistant", "tool")), None)
    if other is not None or (speakers and speakers[-1] != "assistant"):
        raise UserError(
            f"{location}: `{name}` {'ends with' if other is None else 'has'} a turn of {other or 'tool'}, which would be "
            "learned; an answer is the assistant's (and of tools before it); correct or drop the row"
        )
    _check_turns(answer, name, location)


def _check_turns(answer: Sequence[Message], name: str, location: str) -> None:
    for one, other in pairwise(answer):
        if is_unfinished([one]) and other["role"] == "assistant":
            raise UserError(
                f"{location}: `{name}` has two turns of the assistant in a row; join them in one message or drop the row"
            )


def check_turn(prompt: list[Message], answers: Sequence[list[Message]], location: str) -> None:
    """A prompt that ends with the assistant is the beginning of that turn: every answer must go on with it.

    Raises:
        UserError: where an answer cannot: the prompt calls a tool, or the answer begins with one that nobody has called.
    """
    last = prompt[-1]["role"] if prompt else None
    if last not in ("assistant", "tool") and any(answer and answer[0]["role"] == "tool" for answer in answers):
        raise UserError(
            f"{location}: an answer begins with a turn of tool, but the assistant has called none; correct or drop the row"
        )
    if last != "assistant":
        return
    for answer in answers:
        if prompt[-1].get("tool_calls") and answer and answer[0]["role"] == "assistant":
            raise UserError(
                f"{location}: the prompt ends with a call of a tool; its result must come before the answer; add it or "
                "drop the row"
            )
        if not prompt[-1].get("tool_calls") and answer and answer[0]["role"] != "assistant":
            raise UserError(
                f"{location}: the prompt ends with the assistant, whose turn the answer must continue, but the answer "
                f"begins with a turn of {answer[0]['role']}; correct or drop the row"
            )


def is_unfinished(prompt: Sequence[Message]) -> bool:
    """Whether a prompt ends with the beginning of the assistant's turn, which answers continue."""
    return bool(prompt) and prompt[-1]["role"] == "assistant" and not prompt[-1].get("tool_calls")


def joined(prompt: list[Message], answer: list[Message]) -> list[Message]:
    """The conversation of prompt and answer; a turn that the prompt leaves unfinished goes on in the same message."""
    if not is_unfinished(prompt) or not answer:
        return prompt + answer
    content = _text_of(prompt[-1]) + _text_of(answer[0])
    return [*prompt[:-1], {**prompt[-1], **answer[0], "content": content}, *answer[1:]]


def read_template_kwargs(row: Mapping[str, Any], location: str) -> dict[str, Any]:
    """The template's arguments other than the messages: `tools` and all of `chat_template_kwargs`.

    Both may be JSON text; so may each tool be.

    Raises:
        UserError: where they are no JSON, of the wrong type, nested too deeply, or set how a conversation is tokenised.
    """
    kwargs = _decoded(row.get("chat_template_kwargs"), "chat_template_kwargs", location)
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise UserError(f"{location}: `chat_template_kwargs` must be an object of names and values, it is {kwargs!r:.40}")
    if not all(isinstance(name, str) for name in kwargs or {}):
        raise UserError(f"{location}: `chat_template_kwargs` has a name that is no text: {kwargs!r:.40}")
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
    if not isinstance(turn, Mapping):
        raise UserError(f"{location}: `{name}` has a message without {_KEYS}: it is a list of {type(turn).__name__}")
    is_turn, is_message = (turn.get(key) is not None for key in ("from", "role"))
    if is_turn == is_message or (is_turn and "value" not in turn):
        which = "with both of" if is_turn and is_message else "without"
        raise UserError(f"{location}: `{name}` has a message {which} {_KEYS}; its keys are {', '.join(map(str, turn))}")
    if is_turn:
        message = {"role": turn["from"], "content": turn["value"]}
    else:
        # Arrow fills the keys that only other messages have with None.
        message = {key: value for key, value in turn.items() if value is not None or key == "content"}
    role = message["role"]
    message["role"] = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if message["role"] is None:
        raise UserError(f"{location}: `{name}` has a turn from {role!r:.60}; known: {', '.join(_ROLES)}")
    if "tool_calls" in message:
        message["tool_calls"] = _read_tool_calls(message["tool_calls"], name, location)
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = message["content"] = _read_parts(content, name, location)
    if isinstance(content, str):
        read_text(content, name, location)
    elif content is not None or not message.get("tool_calls"):
        raise UserError(f"{location}: a message of `{name}` has no text as its content but {content!r:.40}")
    for key in _REASONING:
        if not isinstance(message.get(key, ""), str):
            raise UserError(f"{location}: `{key}` of a message of `{name}` must be text, it is {message[key]!r:.40}")
    if is_too_deep(message):
        raise UserError(f"{location}: a message of `{name}` is nested too deeply")
    return message


_KEYS = '"role" and "content" (or "from" and "value")'


def _read_parts(parts: Sequence[object], name: str, location: str) -> str:
    """The text of a content that is a list of parts; templates for text would print the list as Python does."""
    texts = []
    for part in parts:
        said = part if isinstance(part, Mapping) else {}
        kind, text = said.get("type", "text"), said.get("text")
        media = next((key for key in _MEDIA if said.get(key) is not None), None)
        if media is not None or kind not in _TEXT_PARTS or not isinstance(text, str):
            what = f"of type {media or kind!r:.40}" if said and (media or kind not in _TEXT_PARTS) else f"{part!r:.40}"
            raise UserError(
                f'{location}: the content of a message of `{name}` has a part {what}; only {{"type": "text", "text": …}} is '
                "read, no images, sound or video; drop the row"
            )
        texts.append(text)
    return "".join(texts)


def _read_tool_calls(value: object, name: str, location: str) -> list[Any]:
    """The calls as the template gets them; their arguments are left as they are, an object or JSON text."""
    calls = _decoded(value, f"tool_calls` of `{name}", location)
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise UserError(f"{location}: `tool_calls` of a message of `{name}` must be a list of objects, it is {calls!r:.60}")
    for call in calls:
        called = call["function"] if isinstance(call.get("function"), Mapping) else call
        arguments = called.get("arguments")
        if not isinstance(called.get("name"), str) or not (arguments is None or isinstance(arguments, Mapping | str)):
            raise UserError(
                f"{location}: a call of `tool_calls` of `{name}` needs a `name` (text) and `arguments` (an object or its "
                f"JSON), it is {call!r:.60}"
            )
    return calls


def _decoded(value: object, name: str, location: str) -> Any:
    """A value, decoded where it is JSON text; None for blank text."""
    decoded = value
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            decoded = parse_json(value)
        except ValueError as error:
            raise UserError(f"{location}: `{name}` is no valid JSON: {error}") from error
    if is_too_deep(decoded):
        raise UserError(f"{location}: `{name}` is nested too deeply")
    return decoded


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
