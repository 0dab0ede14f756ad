"""What is seen of each row where it is tokenised: lengths, what was cut, how answers end, what it repeats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megadpo.data.rows import templates
from megadpo.data.rows.dataset import LocatedRow, RowTokens, TokeniseJob
from megadpo.data.rows.messages import Content, joined
from megadpo.data.rows.row import Row
from megadpo.data.rows.tokenise import GroupTokens
from megadpo.inspect.languages import language_of

MOST_EXAMPLES = 3
"""Of moved boundaries whose tokens are shown, in a chunk of rows: a row has to be tokenised again for it."""
MOST_TOKENS_AFTER_END = 3
"""White space that templates put behind an end-of-turn token."""


@dataclass(frozen=True)
class RowLook:
    """A row as it was read and tokenised.

    Attributes:
        number: position in the sources, from 0.
        location: as errors name it, "pairs.jsonl:17".
        dropped: the reason, or None.
        prompt_tokens: of the longest prompt, before `data.max_length`; 0 of a row that was not tokenised.
        answer_tokens: of each answer, before it.
        lost_prompt, lost_answer: most tokens that a prompt, and an answer, lost to it.
        no_prompt: an answer stands without a prompt.
        implicit_prompt: the prompt is the common beginning of two texts.
        moved: the prompt's last tokens alone and with an answer, where they differ and were looked at; "" where they differ.
        open_ends: which answers do not end in an end-of-turn or end-of-sequence token.
        special_inside: a special token that stands in a text of the row itself; "" where none does.
        prompt_key: hash of the prompts.
        answer_keys: hash of each answer.
        prompt_language, answer_languages: as `language_of`.
    """

    number: int
    location: str
    dropped: str | None
    prompt_tokens: int
    answer_tokens: tuple[int, ...]
    lost_prompt: int
    lost_answer: int
    no_prompt: bool
    implicit_prompt: bool
    moved: tuple[str, str] | str | None
    open_ends: tuple[int, ...]
    special_inside: str
    prompt_key: int
    answer_keys: tuple[int, ...]
    prompt_language: str
    answer_languages: tuple[str, ...]


def look(chunk: Sequence[LocatedRow], tokens: Sequence[RowTokens], job: TokeniseJob, tokenizer: Any) -> list[RowLook]:
    """A `dataset.Look`: what is seen of each of these rows."""
    ends, specials = end_ids(tokenizer, Path(job.tokenizer_path)), special_texts(tokenizer)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    looks, num_examples = [], 0
    for (number, _, location, row), row_tokens in zip(chunk, tokens, strict=True):
        row = row if has_template else row.plain or row
        whole = row_tokens.whole if isinstance(row_tokens.whole, GroupTokens) else None
        moved: tuple[str, str] | str | None = None
        if whole is not None and whole.moved_boundary:
            moved = boundary(row, whole, tokenizer, location) if num_examples < MOST_EXAMPLES else ""
            num_examples += 1
        lost_prompt, lost_answer = _lost(row_tokens)
        texts = [_text_of(content) for content in (*row.prompts, *row.completions)]
        answers = whole.responses if whole is not None else ()
        looks.append(
            RowLook(
                number=number,
                location=location,
                dropped=row_tokens.cut if isinstance(row_tokens.cut, str) else None,
                prompt_tokens=max(map(len, whole.prompts)) if whole is not None else 0,
                answer_tokens=tuple(map(len, answers)),
                lost_prompt=lost_prompt,
                lost_answer=lost_answer,
                no_prompt=row.has_empty_prompt and job.reading.kind != "examples",
                implicit_prompt=row.implicit_prompt and not row.has_empty_prompt,
                moved=moved,
                open_ends=tuple(place for place, ids in enumerate(answers) if not ends_well(ids, ends, tokenizer)),
                special_inside=next((special for special in specials for text in texts if special in text), ""),
                prompt_key=_key(row.prompts),
                answer_keys=tuple(_key((answer,)) for answer in row.completions),
                prompt_language=language_of(texts[0]),
                answer_languages=tuple(language_of(text) for text in texts[len(row.prompts) :]),
            )
        )
    return looks


def end_ids(tokenizer: Any, directory: Path) -> frozenset[int]:
    """Token ids with which a turn or a text ends: those of the tokenizer, of generation_config.json, and special ones.

    Of the special tokens those are left out that begin a text, fill it up or stand for the unknown.
    """
    ids = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        found = _settings(directory / name).get("eos_token_id")
        ids.update(found if isinstance(found, list) else [found])
    others = {tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id} - ids
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids.update(number for number, token in added.items() if token.special and number not in others)
    return frozenset(number for number in ids if isinstance(number, int))


def _settings(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def special_texts(tokenizer: Any) -> list[str]:
    """The special tokens that no row writes by chance: texts of at least three characters."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return [token.content for token in added.values() if token.special and len(token.content) >= 3]


def ends_well(ids: Sequence[int], ends: frozenset[int], tokenizer: Any) -> bool:
    """Whether an answer's last token, or the last before white space, is one of `ends`."""
    for token in reversed(ids[-1 - MOST_TOKENS_AFTER_END :]):
        if token in ends:
            return True
        if tokenizer.decode([token]).strip():
            return False
    return False


def boundary(row: Row, tokens: GroupTokens, tokenizer: Any, location: str) -> tuple[str, str]:
    """The last tokens of the first prompt as it is tokenised alone, and what is there when an answer follows it."""
    prompt, answer = row.prompts[0], row.completions[0]
    if row.conversational:
        assert isinstance(prompt, list) and isinstance(answer, list)
        alone = templates.render_ids(tokenizer, prompt, location, row.template_kwargs, is_prompt=True)
        together = templates.render_ids(tokenizer, joined(prompt, answer), location, row.template_kwargs)
    else:
        alone, together = (list(tokenizer(text)["input_ids"]) for text in (prompt, f"{prompt}{answer}"))
    kept = len(tokens.prompts[0])
    pieces = tokenizer.decode(alone[kept : kept + 6]), tokenizer.decode(together[kept : kept + 2])
    return pieces[0][-40:], pieces[1][:40]


def _lost(tokens: RowTokens) -> tuple[int, int]:
    """Most tokens that a prompt and an answer lost to `data.max_length`."""
    if isinstance(tokens.whole, str) or isinstance(tokens.cut, str):
        return 0, 0
    pairs = list(zip(tokens.whole.sequences(), tokens.cut.sequences(), strict=True))
    lost = [max(len(whole[side]) - len(cut[side]) for whole, cut in pairs) for side in (0, 1)]
    return lost[0] * tokens.cut.cut_prompt, lost[1] * tokens.cut.cut_answer


def _text_of(content: Content) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(str(message.get("content") or "") for message in content)


def _key(contents: Sequence[Content]) -> int:
    """The same of the same texts or messages, white space at their ends aside."""
    parts = [content.strip() if isinstance(content, str) else json.dumps(content, sort_keys=True) for content in contents]
    return int(xxhash.xxh3_64_intdigest("\0".join(parts).encode("utf-8", "surrogatepass")))
