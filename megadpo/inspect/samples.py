"""Sample rows as the model gets them: every token, which of them are special, and which are learned.

What is learned is asked of the collation that training uses, not worked out anew.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from megadpo.config.schema import Config
from megadpo.config.sources import is_held_out
from megadpo.data.batches.collate import collate_step
from megadpo.data.rows import templates
from megadpo.data.rows.dataset import tokenise_job
from megadpo.data.rows.formats import recognise
from megadpo.data.rows.messages import joined
from megadpo.data.rows.sources import iter_rows
from megadpo.inspect.data import Inspected, Side, sources_by_label
from megadpo.objectives.specs import reading_of, scores_prompt

MOST_TOKENS_OF_A_CHARACTER = 8


@dataclass(frozen=True)
class Piece:
    """A token, or those that make up one character together.

    Attributes:
        text: with control characters as escapes; the name of a special token.
        ids: of the tokens.
        is_special: a token that no text is written with.
        is_learned: its log-prob is part of the loss.
    """

    text: str
    ids: tuple[int, ...]
    is_special: bool
    is_learned: bool


@dataclass(frozen=True)
class Part:
    """A prompt or an answer of a sample."""

    role: str
    pieces: Sequence[Piece]

    @property
    def num_tokens(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces)


@dataclass(frozen=True)
class Sample:
    """A row as it is trained on: prompts, then answers."""

    location: str
    parts: Sequence[Part]


def samples(inspected: Inspected, side: Side, count: int) -> list[Sample]:
    """The first kept row and others at even distances, at most `count`."""
    size = len(side.groups)
    places = dict.fromkeys(int(place) for place in np.linspace(0, size - 1, min(count, size)).round()) if size else {}
    return [sample(inspected, side, group_id) for group_id in places]


def sample(inspected: Inspected, side: Side, group_id: int) -> Sample:
    """One kept row."""
    group, tokenizer = side.groups[group_id], inspected.tokenizer
    reads_prompts = scores_prompt(inspected.config.objective.loss_types)
    (stream,) = collate_step(side.groups, [group_id], [[0]], score_prompts=reads_prompts)
    learned = set(zip(stream.response_N.tolist(), stream.place_N.tolist(), strict=True))
    num_prompt_places = int((stream.place_N == 0).sum())
    roles = answer_names(side, group.row_values, len(group.responses))
    parts = []
    for number, prompt in enumerate(group.prompts):
        # Of the prompt's tokens all but the first are read where any is, with the first response.
        first = len(prompt) - num_prompt_places if number == 0 else len(prompt)
        is_learned = [place >= first for place in range(len(prompt))]
        name = "prompt" if len(group.prompts) == 1 else f"prompt of {roles[number]}"
        parts.append(Part(name, pieces(tokenizer, prompt.tolist(), is_learned)))
    for number, response in enumerate(group.responses):
        is_learned = [(number, place + 1) in learned for place in range(len(response))]
        parts.append(Part(roles[number], pieces(tokenizer, response.tolist(), is_learned)))
    return Sample(side.location(group_id), parts)


def answer_names(side: Side, row_values: Any, count: int) -> list[str]:
    """What each answer of a group is called."""
    if side.report.kind == "pairs":
        return ["chosen", "rejected"]
    if side.report.kind == "labels":
        return ["desirable" if label > 0.5 else "undesirable" for label in row_values["label"]]
    if side.report.kind == "lists":
        return [f"answer {place + 1} (score {row_values['score'][place]:g})" for place in range(count)]
    return ["answer"]


def pieces(tokenizer: Any, ids: Sequence[int], is_learned: Sequence[bool]) -> list[Piece]:
    """Tokens as text; those that are parts of one character stand together."""
    special = {*tokenizer.all_special_ids}
    special.update(number for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special)
    found, place = [], 0
    while place < len(ids):
        end = place + 1
        if ids[place] in special:
            text = str(tokenizer.convert_ids_to_tokens(ids[place]))
        else:
            text = tokenizer.decode(ids[place:end])
            while "\ufffd" in text and end < min(len(ids), place + MOST_TOKENS_OF_A_CHARACTER) and ids[end] not in special:
                end += 1
                text = tokenizer.decode(ids[place:end])
            if "\ufffd" in text:  # no character comes of it
                end, text = place + 1, str(tokenizer.convert_ids_to_tokens(ids[place]))
        found.append(Piece(printable(text), tuple(ids[place:end]), ids[place] in special, all(is_learned[place:end])))
        place = end
    return found


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey: control and formatting characters as escapes, line ends as they are."""

    def shown(character: str) -> str:
        if character == "\n" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            return character
        return {"\t": "\\t", "\r": "\\r"}.get(character, f"\\u{ord(character):04x}")

    return text if text.isascii() and text.isprintable() else "".join(map(shown, text))


def rendered(config: Config, inspected: Inspected, name: str) -> tuple[str, str] | None:
    """Where the first conversation among the first rows stands, and what the template writes of it; None: there is none."""
    sources = sources_by_label(config)[name]
    found, job = tokenise_job(
        config.data, sources, str(inspected.model.huggingface), reading_of(config.objective), is_held_out(name)
    )
    for source in found:
        for location, fields in islice(iter_rows(source), 100):
            row = recognise(fields, location, job.reading, job.allow_no_prompt)
            has_template = bool(inspected.tokenizer.chat_template)
            if not (row.conversational and has_template) or row.reason_to_drop() is not None:
                continue
            prompt, answer = row.prompts[0], row.completions[0]
            assert isinstance(prompt, list) and isinstance(answer, list)
            text = templates.render_text(inspected.tokenizer, joined(prompt, answer), location, row.template_kwargs)
            return location, printable(text)
    return None
