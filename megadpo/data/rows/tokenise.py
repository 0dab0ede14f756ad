"""Rows -> token ids: the prompt/completion boundary, end-of-sequence and truncation rules.

Boundary and end-of-sequence are those of TRL 1.16 (`_prepare_dataset` of its DPO, KTO and SFT trainers), `keep_start` and
`keep_end` those of its `DataCollatorForPreference`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megadpo.data.rows import templates
from megadpo.data.rows.encode import encode
from megadpo.data.rows.messages import Content, as_messages, common_prefix_length, joined
from megadpo.data.rows.row import EMPTY, IDENTICAL, IDENTICAL_LIST, Row
from megadpo.errors import UserError, reason

TRUNCATED_AWAY = "completion truncated away"
IDENTICAL_TRUNCATED = "identical after truncation"
TRUNCATIONS = ("prompt_left", "keep_start", "keep_end")

_LAST_TURN = "\n\nHuman:"


@dataclass(frozen=True)
class GroupTokens:
    """A tokenised row: a prompt with K >= 1 completions (of a pair, chosen first).

    Attributes:
        prompts: one list of ids for all completions, or K where the prompts differ.
        responses: ids of the completions.
        moved_boundary: whether the tokenised prompt is no prefix of the tokenised prompt + completion.
        truncated: whether tokens were cut.
        cut_prompt: whether some were a prompt's.
        cut_answer: whether some were a completion's.
    """

    prompts: tuple[list[int], ...]
    responses: tuple[list[int], ...]
    moved_boundary: bool = False
    truncated: bool = False
    cut_prompt: bool = field(default=False, compare=False)
    cut_answer: bool = field(default=False, compare=False)

    def sequences(self) -> list[tuple[list[int], list[int]]]:
        """(prompt, completion) of every response."""
        prompts = self.prompts if len(self.prompts) > 1 else self.prompts * len(self.responses)
        return list(zip(prompts, self.responses, strict=True))


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
        raise UserError(f"model.path: no tokenizer could be loaded from {path}: {reason(error)}") from error
    if num_ids == 0:
        raise UserError(
            f"model.path: the tokenizer of {path} has no vocabulary; tokenizer.json or tokenizer.model is missing"
        )
    # No warning about rows that are longer than the model's context: they are truncated later.
    tokenizer.model_max_length = 1 << 60
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


PROBES = (
    "The quick brown fox can't jump over 3,141.59 dogs…  twice!\n\tdef f(x): return x**2  # ok",
    "Übergrößenträger naïve façade Ελληνικά Русский текст עברית العربية हिन्दी ไทย 中文字符，日本語かな 한국어",
    '<|im_start|>user\n[INST] </s><eos> {"a": [1, 2]} 😀👩‍🚀 \u00a0\r\n',
)
"""Texts on which two tokenizers with the same vocabulary and other merges or other splits differ."""
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json")


def tokenizers_differ(path: str, other: str) -> str | None:
    """How the tokenizer at `other` reads other ids than the one at `path`; None where it does not, or is not there.

    Ids that only one of them has are no difference.

    Raises:
        UserError: one of them cannot be loaded.
    """
    ours, theirs = (
        {name: file.read_bytes() for name in _VOCABULARIES if (file := Path(folder) / name).is_file()}
        for folder in (path, other)
    )
    if not theirs or ours == theirs:
        return None
    one, two = load_tokenizer(path), load_tokenizer(other)
    tokens = {number: token for token, number in two.get_vocab().items()}
    for token, number in sorted(one.get_vocab().items(), key=lambda item: item[1]):
        if tokens.get(number, token) != token:
            return f"reads token id {number} as {tokens[number]!r:.40}, the policy's as {token!r:.40}"
    for text in PROBES:
        if encode(one, [text], add_special_tokens=False) != encode(two, [text], add_special_tokens=False):
            return f"has the same tokens but splits text in another way, such as {text[:20]!r}…"
    return None


def tokenise_rows(rows: Sequence[tuple[str, Row]], tokenizer: Any) -> list[GroupTokens | str]:
    """Tokenise located rows; a string in the result is the reason why the row is dropped.

    All texts of all rows go to the tokenizer at once, and so do all rendered conversations.

    Raises:
        UserError: for a tokenizer without an end-of-sequence token or template, or a row its template refuses.
    """
    if not getattr(tokenizer, "chat_template", None):
        rows = [(location, row.plain or row) for location, row in rows]
    results: list[GroupTokens | str] = [row.reason_to_drop() or "" for _, row in rows]
    kept = [(location, row) for (location, row), reason in zip(rows, results, strict=True) if not reason]
    texts: list[str] = []
    conversations: list[templates.Conversation] = []
    for location, row in kept:
        if row.conversational:
            conversations += _conversations_of(row, tokenizer, location)
        else:
            texts += _texts_of(row, tokenizer, location)
    ids_of_texts = iter(encode(tokenizer, texts))
    ids_of_conversations = iter(templates.render_all(tokenizer, conversations))
    tokenised = []
    for location, row in kept:
        ids = ids_of_conversations if row.conversational else ids_of_texts
        prompts = [next(ids) for _ in row.prompts]
        wholes = [next(ids) for _ in row.completions]
        own = prompts if len(prompts) > 1 else prompts * len(wholes)
        boundaries = [common_prefix_length(prompt, whole) for prompt, whole in zip(own, wholes, strict=True)]
        if row.conversational:
            _check_prompts_survive(row, own, boundaries, tokenizer, location)
        tokenised.append(_split(prompts, wholes, boundaries))
    in_order = iter(tokenised)
    return [reason or next(in_order) for reason in results]


def _texts_of(row: Row, tokenizer: Any, location: str) -> list[str]:
    """The prompts, then every prompt + completion + end-of-sequence token."""
    eos = tokenizer.eos_token
    if eos is None:
        raise UserError(f"{location}: the tokenizer has no end-of-sequence token (eos_token); rows of text need one")
    wholes = []
    for prompt, completion in _sequences_of(row):
        assert isinstance(prompt, str) and isinstance(completion, str)
        wholes.append(prompt + (completion if completion.endswith(eos) else completion + eos))
    return [str(prompt) for prompt in row.prompts] + wholes


def _sequences_of(row: Row) -> list[tuple[Content, Content]]:
    prompts = row.prompts if len(row.prompts) > 1 else row.prompts * len(row.completions)
    return list(zip(prompts, row.completions, strict=True))


def _conversations_of(row: Row, tokenizer: Any, location: str) -> list[templates.Conversation]:
    """The prompts, then every prompt + completion."""
    templates.check_template(tokenizer, location)
    kwargs = row.template_kwargs
    conversations = [templates.Conversation(as_messages(prompt), location, kwargs, True) for prompt in row.prompts]
    for prompt, completion in _sequences_of(row):
        assert isinstance(prompt, list) and isinstance(completion, list)
        conversations.append(templates.Conversation(joined(prompt, completion), location, kwargs))
    return conversations


def _check_prompts_survive(row: Row, prompts: list[list[int]], boundaries: list[int], tokenizer: Any, location: str) -> None:
    """Run `templates.check_prompt_survives` where a tokenised prompt is no prefix of prompt + completion."""
    for (prompt, completion), alone, boundary in zip(_sequences_of(row), prompts, boundaries, strict=True):
        assert isinstance(prompt, list) and isinstance(completion, list)
        if boundary < len(alone):
            templates.check_prompt_survives(tokenizer, prompt, completion, location, row.template_kwargs)


def _split(prompts: list[list[int]], wholes: list[list[int]], boundaries: list[int]) -> GroupTokens | str:
    """Split every prompt + completion at its boundary; those of a shared prompt all at the smallest of theirs."""
    if len(prompts) == 1:
        boundaries = [min(boundaries)] * len(wholes)
    tokens = GroupTokens(
        prompts=tuple(prompt[:boundary] for prompt, boundary in zip(prompts, boundaries, strict=False)),
        responses=tuple(whole[boundary:] for whole, boundary in zip(wholes, boundaries, strict=True)),
        moved_boundary=any(boundary < len(prompt) for prompt, boundary in zip(prompts, boundaries, strict=False)),
    )
    if not all(tokens.responses):
        return EMPTY
    if _all_same(tokens.sequences()):
        return IDENTICAL if len(wholes) == 2 else IDENTICAL_LIST
    return tokens


def _all_same(sequences: Sequence[tuple[list[int], list[int]]]) -> bool:
    return len(sequences) > 1 and all(sequence == sequences[0] for sequence in sequences)


def truncate(
    tokens: GroupTokens, max_length: int | None, truncation: str, num_protected: Sequence[int] = (1,)
) -> GroupTokens | str:
    """Cut a group to `max_length` tokens a sequence; a string is the reason why it is dropped.

    Every prompt that is returned has at least one token: where none is left, the first completion token takes its
    place, as nothing predicts it (TRL shifts it out of the mask).

    Args:
        tokens: what `tokenise_rows` returned.
        max_length: the most tokens of prompt and completion together; None for no limit.
        truncation: "prompt_left" cuts the beginning of the prompt, then the ends of the completions; "keep_start" and
            "keep_end" cut the whole sequence as TRL does.
        num_protected: with "prompt_left", tokens at the end of each prompt (its last user turn) that are kept before
            the completions' ends are, up to half of `max_length`.
    """
    sequences = whole = tokens.sequences()
    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    truncated = max_length is not None and longest > max_length
    if truncated:
        assert max_length is not None
        if truncation == "prompt_left":
            sequences = _cut_prompt_left(tokens, max_length, num_protected)
        elif truncation == "keep_start":
            sequences = [_cut_keep_start(prompt, response, max_length) for prompt, response in sequences]
        else:
            sequences = [_cut_keep_end(prompt, response, max_length) for prompt, response in sequences]
    if not all(response for _, response in sequences):
        return TRUNCATED_AWAY
    if _all_same(sequences):
        return IDENTICAL_TRUNCATED
    cut_prompt, cut_answer = (any(len(a[i]) < len(b[i]) for a, b in zip(sequences, whole, strict=True)) for i in (0, 1))
    sequences = [(prompt, response) if prompt else (response[:1], response[1:]) for prompt, response in sequences]
    if not all(response for _, response in sequences):
        return TRUNCATED_AWAY
    prompts, responses = zip(*sequences, strict=True)
    if all(prompt == prompts[0] for prompt in prompts):
        prompts = prompts[:1]
    return replace(
        tokens, prompts=prompts, responses=responses, truncated=truncated, cut_prompt=cut_prompt, cut_answer=cut_answer
    )


def _cut_keep_start(prompt: list[int], response: list[int], max_length: int) -> tuple[list[int], list[int]]:
    return prompt[:max_length], response[: max(max_length - len(prompt), 0)]


def _cut_keep_end(prompt: list[int], response: list[int], max_length: int) -> tuple[list[int], list[int]]:
    excess = max(len(prompt) + len(response) - max_length, 0)
    return prompt[excess:], response[max(excess - len(prompt), 0) :]


def _cut_prompt_left(
    tokens: GroupTokens, max_length: int, num_protected: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """A shared prompt is cut once, so that it stays shared; prompts that differ are cut each by itself."""
    sequences = tokens.sequences()
    if len(tokens.prompts) == 1:
        longest = max(len(response) for response in tokens.responses)
        num_kept = [_num_prompt_kept(len(tokens.prompts[0]), longest, max_length, num_protected[0])] * len(sequences)
    else:
        num_kept = [
            _num_prompt_kept(len(prompt), len(response), max_length, num_protected[min(i, len(num_protected) - 1)])
            for i, (prompt, response) in enumerate(sequences)
        ]
    return [
        (prompt[len(prompt) - kept :], response[: max_length - kept])
        for (prompt, response), kept in zip(sequences, num_kept, strict=True)
    ]


def _num_prompt_kept(num_prompt: int, num_response: int, max_length: int, num_protected: int) -> int:
    protected = max(1, min(num_protected, max_length // 2))
    return min(num_prompt, max(max_length - num_response, protected))


def last_turn_lengths(row: Row, tokens: GroupTokens, tokenizer: Any, location: str) -> list[int]:
    """Tokens at the end of each prompt that are its last user turn; 1 where the row shows no turns."""
    lengths = []
    for prompt, prompt_ids in zip(row.prompts, tokens.prompts, strict=True):
        ids: list[int] = []
        if isinstance(prompt, list):
            ids = templates.last_turn_ids(tokenizer, prompt, location, row.template_kwargs)
        elif isinstance(prompt, str) and _LAST_TURN in prompt:
            ids = tokenizer(prompt[prompt.rindex(_LAST_TURN) :], add_special_tokens=False)["input_ids"]
        lengths.append(max(1, common_prefix_length(ids[::-1], prompt_ids[::-1])))
    return lengths
