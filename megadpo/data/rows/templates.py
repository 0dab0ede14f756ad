"""Chat templates: messages -> token ids, as transformers and TRL 1.16 render them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megadpo.data.rows.encode import encode
from megadpo.data.rows.messages import MAX_CHARACTERS, Message, common_prefix_length, is_unfinished, joined
from megadpo.data.rows.time_limit import cpu_limit
from megadpo.errors import UserError, reason
from megadpo.files import expanded

SECONDS = 10.0
"""Of CPU time that a template may take for a conversation: a thousand times what the longest real ones do."""
SECONDS_MORE = 0.05
"""For each further conversation that is rendered with it."""
MAX_RENDERED = 4 * MAX_CHARACTERS


def read_template(value: str | None) -> str | None:
    """The template's text for `data.chat_template`: a path to a jinja file, or the text itself.

    Raises:
        UserError: where it is neither.
    """
    if value is None:
        return None
    if "{" not in value or (len(value) < 255 and os.path.exists(value)):
        try:
            return expanded(value, "data.chat_template").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.chat_template: {value} is neither a readable file nor a template: {error}") from error
    return value


def check_template(tokenizer: Any, location: str) -> None:
    """Refuse conversational rows without a template.

    Raises:
        UserError: where the tokenizer has no chat template (`data.chat_template` is set on it when it is loaded).
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{location}: the row is conversational and the tokenizer has no chat template; "
            "set data.chat_template to a jinja file"
        )


@dataclass(frozen=True)
class Conversation:
    """Messages to be rendered.

    Attributes:
        location: of their row, for error messages.
        kwargs: the template's other arguments (`Row.template_kwargs`).
        is_prompt: whether the template is to end with the beginning of an answer, or within one that the messages begin.
    """

    messages: list[Message]
    location: str
    kwargs: Mapping[str, Any]
    is_prompt: bool = False


def render_all(tokenizer: Any, conversations: Sequence[Conversation]) -> list[list[int]]:
    """Token ids of every conversation, as `render_ids` gives them; raises what that raises.

    transformers renders a conversation to text and tokenises that: here they are rendered and tokenised together.
    """
    one_by_one = [(c.messages, c.location, c.kwargs, c.is_prompt) for c in conversations]
    if not _renders_text(tokenizer):
        return [render_ids(tokenizer, *conversation) for conversation in one_by_one]
    try:
        return encode(tokenizer, _render_texts(tokenizer, conversations), add_special_tokens=False)
    except Exception:  # one by one, the row that was refused is found and named
        return [render_ids(tokenizer, *conversation) for conversation in one_by_one]


def _renders_text(tokenizer: Any) -> bool:
    """False for a tokenizer that overrides apply_chat_template (Mistral's): it is called as it is."""
    from transformers import PreTrainedTokenizerBase

    return type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template


def _render_texts(tokenizer: Any, conversations: Sequence[Conversation]) -> list[str]:
    """Every conversation as rendered text; those without further template arguments are rendered together."""
    together: dict[bool, list[int]] = {True: [], False: []}
    texts = []
    for place, c in enumerate(conversations):
        is_alone = bool(c.kwargs) or not c.messages or (c.is_prompt and is_unfinished(c.messages))
        texts.append(render_text(tokenizer, c.messages, c.location, c.kwargs, c.is_prompt) if is_alone else "")
        if not is_alone:
            together[c.is_prompt].append(place)
    for is_prompt, places in together.items():
        if places:
            messages = [conversations[place].messages for place in places]
            with cpu_limit(SECONDS + SECONDS_MORE * len(places)):
                rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_prompt)
            for place, text in zip(places, rendered, strict=True):
                texts[place] = _checked_length(str(text))
    return texts


def render_ids(
    tokenizer: Any, messages: list[Message], location: str, kwargs: Mapping[str, Any], is_prompt: bool = False
) -> list[int]:
    """Token ids of a conversation; the template alone places BOS and EOS.

    Args:
        kwargs: the template's other arguments (`Row.template_kwargs`).
        is_prompt: whether the template is to end with the beginning of an answer; one that the messages have begun stays
            open, as by transformers' `continue_final_message`.

    Raises:
        UserError: where the template refuses the messages (roles out of order, …).
    """
    if _renders_text(tokenizer):
        text = render_text(tokenizer, messages, location, kwargs, is_prompt)
        try:
            return encode(tokenizer, [text], add_special_tokens=False)[0]
        except Exception as error:
            raise _refused(error, location) from error
    try:
        output = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, **_ending(messages, is_prompt), **kwargs
        )
    except Exception as error:
        raise _refused(error, location) from error
    return list(output["input_ids"])


def render_text(
    tokenizer: Any, messages: list[Message], location: str, kwargs: Mapping[str, Any], is_prompt: bool = False
) -> str:
    """The conversation as the template writes it, before tokenisation; raises what `render_ids` raises."""
    try:
        with cpu_limit(SECONDS):
            text = tokenizer.apply_chat_template(messages, tokenize=False, **_ending(messages, is_prompt), **kwargs)
        return _checked_length(str(text))
    except Exception as error:
        raise _refused(error, location) from error


def _checked_length(text: str) -> str:
    if len(text) > MAX_RENDERED:
        raise ValueError(f"what it writes has {len(text):,} characters")
    return text


def _ending(messages: list[Message], is_prompt: bool) -> dict[str, bool]:
    if is_prompt and is_unfinished(messages):
        return {"continue_final_message": True}
    return {"add_generation_prompt": is_prompt}


def check_prompt_survives(
    tokenizer: Any, prompt: list[Message], completion: list[Message], location: str, kwargs: Mapping[str, Any]
) -> None:
    """Refuse a template that renders the prompt so differently with a completion that its last turn is not common.

    Where the rendered prompt is no prefix of the rendered conversation, the completion starts at their first
    difference. That is right for a generation prompt that the conversation leaves out (DeepSeek-R1's "<think>"), and
    nonsense where it lies before the end of the last user turn, which would be trained as if it were the answer.

    Raises:
        UserError: for such a row.
    """
    alone = render_text(tokenizer, prompt, location, kwargs, is_prompt=True)
    whole = render_text(tokenizer, joined(prompt, completion), location, kwargs)
    common = common_prefix_length(alone, whole)
    content = prompt[-1].get("content")
    text = content.strip() if isinstance(content, str) else ""
    start = alone.rfind(text) if text else -1
    needed = start + len(text) if start >= 0 else 1
    if common < needed:
        raise UserError(
            f"{location}: the chat template renders the prompt differently with an answer than alone, already at "
            f"character {common} ({alone[common : common + 20]!r} against {whole[common : common + 20]!r}), before the "
            "last turn ends, so the answer's beginning is unknown; set data.chat_template to a template that does not"
        )


def last_turn_ids(tokenizer: Any, prompt: list[Message], location: str, kwargs: Mapping[str, Any]) -> list[int]:
    """Token ids of the last user turn rendered on its own, generation prompt included.

    Its common end with the tokenised prompt is the part of the prompt that is the last turn.
    """
    users = [index for index, message in enumerate(prompt) if message.get("role") == "user"]
    turns = prompt[users[-1] :] if users else prompt[-1:]
    try:
        return render_ids(tokenizer, turns, location, kwargs, is_prompt=True)
    except UserError:  # a template may insist on a system message; then no turn is protected
        return []


def _refused(error: Exception, location: str) -> UserError:
    return UserError(f"{location}: the chat template refuses the row: {reason(error)}")
