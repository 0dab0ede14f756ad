"""Preference rows -> token ids: the prompt/completion boundary, end-of-sequence and truncation rules.

Boundary and end-of-sequence are those of TRL 1.16 (`DPOTrainer._prepare_dataset`), `keep_start` and `keep_end` those of
its `DataCollatorForPreference`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megadpo.data import templates
from megadpo.data.formats import PreferenceRow, first_difference
from megadpo.errors import UserError

EMPTY = "empty completion"
IDENTICAL = "identical chosen and rejected"
TRUNCATED_AWAY = "completion truncated away"
IDENTICAL_TRUNCATED = "identical after truncation"
TRUNCATIONS = ("prompt_left", "keep_start", "keep_end")

_LAST_TURN = "\n\nHuman:"


@dataclass(frozen=True)
class PairTokens:
    """A tokenised pair, chosen first.

    Attributes:
        prompts: one list of ids for both sides, or two where the prompts differ.
        responses: ids of the completions.
        moved_boundary: True where the tokenised prompt was no prefix of the tokenised whole.
        truncated: True where tokens were cut.
    """

    prompts: tuple[list[int], ...]
    responses: tuple[list[int], list[int]]
    moved_boundary: bool = False
    truncated: bool = False

    def sides(self) -> list[tuple[list[int], list[int]]]:
        """(prompt, completion) of chosen and of rejected."""
        return [(self.prompts[0], self.responses[0]), (self.prompts[-1], self.responses[1])]


def load_tokenizer(path: str, chat_template: str | None = None) -> Any:
    """The tokenizer of a local model directory, with `data.chat_template` set on it where given.

    Raises:
        UserError: where the directory or its tokenizer is missing or broken.
    """
    if not os.path.isdir(path):
        raise UserError(f"model.path: {path} is not a directory; the tokenizer is read from it")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        num_ids = len(tokenizer("a")["input_ids"]) + len(tokenizer)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"model.path: no tokenizer could be loaded from {path}: {reason}") from error
    if num_ids == 0:
        raise UserError(
            f"model.path: the tokenizer of {path} has no vocabulary; tokenizer.json or tokenizer.model is missing"
        )
    # Rows may be longer than the model's context before they are truncated; that is no reason to warn.
    tokenizer.model_max_length = 1 << 60
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def tokenise_rows(rows: Sequence[tuple[str, PreferenceRow]], tokenizer: Any) -> list[PairTokens | str]:
    """Tokenise located rows; a string in the result is the reason why the row is dropped.

    Raises:
        UserError: for a tokenizer without an end-of-sequence token or template, or a row its template refuses.
    """
    results: list[PairTokens | str] = []
    texts: list[str] = []
    num_texts: list[int] = []
    for location, row in rows:
        if row.has_empty_completion:
            results.append(EMPTY)
        elif row.is_identical:
            results.append(IDENTICAL)
        elif row.conversational:
            results.append(_tokenise_conversation(row, tokenizer, location))
        else:
            results.append("")
            row_texts = _texts_of(row, tokenizer, location)
            texts += row_texts
            num_texts.append(len(row_texts))
    ids = iter(tokenizer(texts)["input_ids"] if texts else ())
    counts = iter(num_texts)
    for index, result in enumerate(results):
        if result == "":
            results[index] = _pair([next(ids) for _ in range(next(counts))])
    return results


def _texts_of(row: PreferenceRow, tokenizer: Any, location: str) -> list[str]:
    """[prompt, prompt + chosen, prompt + rejected], or with differing prompts [p, p + chosen, q, q + rejected]."""
    eos = tokenizer.eos_token
    if eos is None:
        raise UserError(f"{location}: the tokenizer has no end-of-sequence token (eos_token); rows of text need one")
    assert isinstance(row.prompt, str) and isinstance(row.chosen, str) and isinstance(row.rejected, str)
    chosen, rejected = (side if side.endswith(eos) else side + eos for side in (row.chosen, row.rejected))
    if row.rejected_prompt is None:
        return [row.prompt, row.prompt + chosen, row.prompt + rejected]
    assert isinstance(row.rejected_prompt, str)
    return [row.prompt, row.prompt + chosen, row.rejected_prompt, row.rejected_prompt + rejected]


def _tokenise_conversation(row: PreferenceRow, tokenizer: Any, location: str) -> PairTokens | str:
    templates.check_template(tokenizer, location)
    kwargs = row.template_kwargs
    prompts = [row.prompt] if row.rejected_prompt is None else [row.prompt, row.rejected_prompt]
    ids = []
    for number, completion in enumerate((row.chosen, row.rejected)):
        prompt = prompts[min(number, len(prompts) - 1)]
        assert isinstance(prompt, list) and isinstance(completion, list)
        if number < len(prompts):
            prompt_ids = templates.render_ids(tokenizer, prompt, location, add_generation_prompt=True, **kwargs)
            ids.append(prompt_ids)
        whole_ids = templates.render_ids(tokenizer, prompt + completion, location, **kwargs)
        ids.append(whole_ids)
        if first_difference(prompt_ids, whole_ids) < len(prompt_ids):
            templates.check_prompt_survives(tokenizer, prompt, completion, location, **kwargs)
    return _pair(ids)


def _pair(ids: list[list[int]]) -> PairTokens | str:
    """Split prompt and completions at the shorter common prefix of the prompt with either whole."""
    if len(ids) == 3:
        prompt, chosen, rejected = ids
        cut = min(first_difference(prompt, chosen), first_difference(prompt, rejected))
        moved = cut < len(prompt)
        pair = PairTokens((prompt[:cut],), (chosen[cut:], rejected[cut:]), moved)
    else:
        prompt, chosen, other, rejected = ids
        cut, other_cut = first_difference(prompt, chosen), first_difference(other, rejected)
        moved = cut < len(prompt) or other_cut < len(other)
        pair = PairTokens((prompt[:cut], other[:other_cut]), (chosen[cut:], rejected[other_cut:]), moved)
    if not all(pair.responses):
        return EMPTY
    sides = pair.sides()
    return IDENTICAL if sides[0] == sides[1] else pair


def truncate(
    pair: PairTokens, max_length: int | None, truncation: str, num_protected: Sequence[int] = (1,)
) -> PairTokens | str:
    """Cut a pair to `max_length` tokens a sequence; a string is the reason why it is dropped.

    Every prompt that is returned has at least one token: where none is left, the first completion token takes its
    place, as nothing predicts it (TRL shifts it out of the mask).

    Args:
        pair: what `tokenise_rows` returned.
        max_length: the most tokens of prompt and completion together; None for no limit.
        truncation: "prompt_left" cuts the beginning of the prompt, then the ends of the completions; "keep_start" and
            "keep_end" cut the whole sequence as TRL does.
        num_protected: with "prompt_left", tokens at the end of each prompt (its last user turn) that are kept before
            the completions' ends are, up to half of `max_length`.
    """
    sides = pair.sides()
    longest = max(len(prompt) + len(response) for prompt, response in sides)
    truncated = max_length is not None and longest > max_length
    if truncated:
        assert max_length is not None
        if truncation == "prompt_left":
            sides = _cut_prompt_left(pair, max_length, num_protected)
        elif truncation == "keep_start":
            sides = [(prompt[:max_length], response[: max(max_length - len(prompt), 0)]) for prompt, response in sides]
        else:
            sides = [_cut_keep_end(prompt, response, max_length) for prompt, response in sides]
    if not all(response for _, response in sides):
        return TRUNCATED_AWAY
    if sides[0] == sides[1]:
        return IDENTICAL_TRUNCATED
    sides = [(prompt, response) if prompt else (response[:1], response[1:]) for prompt, response in sides]
    if not all(response for _, response in sides):
        return TRUNCATED_AWAY
    (prompt, chosen), (other, rejected) = sides
    prompts = (prompt,) if prompt == other else (prompt, other)
    return replace(pair, prompts=prompts, responses=(chosen, rejected), truncated=truncated)


def _cut_keep_end(prompt: list[int], response: list[int], max_length: int) -> tuple[list[int], list[int]]:
    excess = max(len(prompt) + len(response) - max_length, 0)
    return prompt[excess:], response[max(excess - len(prompt), 0) :]


def _cut_prompt_left(pair: PairTokens, max_length: int, num_protected: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """One cut for a shared prompt, so that it stays shared; each side its own where the prompts differ."""
    sides = pair.sides()
    if len(pair.prompts) == 1:
        longest = max(len(response) for response in pair.responses)
        num_kept = [_num_prompt_kept(len(pair.prompts[0]), longest, max_length, num_protected[0])] * 2
    else:
        num_kept = [
            _num_prompt_kept(len(prompt), len(response), max_length, num_protected[min(i, len(num_protected) - 1)])
            for i, (prompt, response) in enumerate(sides)
        ]
    return [
        (prompt[len(prompt) - kept :], response[: max_length - kept])
        for (prompt, response), kept in zip(sides, num_kept, strict=True)
    ]


def _num_prompt_kept(num_prompt: int, num_response: int, max_length: int, num_protected: int) -> int:
    protected = max(1, min(num_protected, max_length // 2))
    return min(num_prompt, max(max_length - num_response, protected))


def last_turn_lengths(row: PreferenceRow, pair: PairTokens, tokenizer: Any, location: str) -> list[int]:
    """Tokens at the end of each prompt that are its last user turn; 1 where the row shows no turns."""
    prompts = [row.prompt, row.rejected_prompt][: len(pair.prompts)]
    lengths = []
    for prompt, prompt_ids in zip(prompts, pair.prompts, strict=True):
        ids: list[int] = []
        if isinstance(prompt, list):
            ids = templates.last_turn_ids(tokenizer, prompt, location, **row.template_kwargs)
        elif isinstance(prompt, str) and _LAST_TURN in prompt:
            ids = tokenizer(prompt[prompt.rindex(_LAST_TURN) :], add_special_tokens=False)["input_ids"]
        lengths.append(max(1, first_difference(ids[::-1], prompt_ids[::-1])))
    return lengths
