"""Two answers as a pair with its prompt: the explicit one, or what two texts or two conversations have in common."""

from __future__ import annotations

from megadpo.data.rows.messages import Content, Message, check_answer, common_prefix_length
from megadpo.data.rows.row import Row
from megadpo.errors import UserError

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def text_pair(prompt: str | None, chosen: str, rejected: str, location: str) -> Row:
    if prompt is not None:
        return Row((prompt,), (chosen, rejected), conversational=False)
    marks = [(_HUMAN in text, _ASSISTANT in text) for text in (chosen, rejected)]
    if not chosen.strip() or not rejected.strip():
        whole = max(chosen, rejected, key=lambda text: len(text.strip()))
        boundary = whole.rindex(_ASSISTANT) + len(_ASSISTANT) if _HUMAN in whole and _ASSISTANT in whole else 0
        answers = (chosen[boundary:] if chosen.strip() else "", rejected[boundary:] if rejected.strip() else "")
        return Row((whole[:boundary],), answers, False, implicit_prompt=not boundary)
    if marks[0] != marks[1]:
        raise UserError(
            f"{location}: one of `chosen` and `rejected` is a dialogue of {_HUMAN!r} and {_ASSISTANT!r} and the other is "
            "not; correct or drop the row, or add a `prompt` field"
        )
    if all(all(mark) for mark in marks):
        chosen_boundary, rejected_boundary = (text.rindex(_ASSISTANT) + len(_ASSISTANT) for text in (chosen, rejected))
        if any(_HUMAN in text[cut:] for text, cut in ((chosen, chosen_boundary), (rejected, rejected_boundary))):
            raise UserError(f"{location}: a dialogue ends with a turn of {_HUMAN!r}, which would be learned; drop the row")
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


def message_pair(prompt: Content | None, chosen: list[Message], rejected: list[Message], location: str) -> Row:
    if isinstance(prompt, list) and prompt:
        return Row((prompt,), without_repeated_prompt(prompt, [chosen, rejected]), True)
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


def without_repeated_prompt(prompt: list[Message], completions: list[list[Message]]) -> tuple[list[Message], ...]:
    """The completions without the prompt, with or without its system message, which some files repeat in each of them."""
    for repeated in (prompt, prompt[1:] if prompt[0]["role"] == "system" else []):
        if repeated and all(completion[: len(repeated)] == repeated for completion in completions):
            return tuple(completion[len(repeated) :] for completion in completions)
    return tuple(completions)
