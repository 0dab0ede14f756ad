"""A micro-batch: groups laid out as one flat token stream, with what attention and the head need to know of it.

Axes: T tokens of the stream, N scored positions, R responses of the micro-batch, P pairs, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megadpo.data.groups import Group


@dataclass(frozen=True)
class Segment:
    """Consecutive stream tokens that attend alike: causally to themselves, and wholly to a shared prompt before them.

    Attributes:
        start, end: the tokens [start, end) of the stream, which are queries and keys.
        prompt_start, prompt_end: further keys, all of them visible; empty (equal) where the segment stands alone.
    """

    start: int
    end: int
    prompt_start: int = 0
    prompt_end: int = 0

    @property
    def keys(self) -> slice:
        """The stream tokens that are its own keys."""
        return slice(self.start, self.end)


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a Part that attend alike, as part of a segment.

    Attributes:
        start, end: the queries, as places among the part's tokens.
        keys_start, keys_end: their own keys in the stream; the last query sees all of them, each one before one key less.
        prompt_start, prompt_end: further keys in the stream, all of them visible.
    """

    start: int
    end: int
    keys_start: int
    keys_end: int
    prompt_start: int = 0
    prompt_end: int = 0

    @property
    def keys(self) -> slice:
        """The stream tokens that are its own keys."""
        return slice(self.keys_start, self.keys_end)


@dataclass(frozen=True)
class Part:
    """What one context-parallel rank holds of a micro-batch, see data/cut.py; every part has the same number of tokens.

    Attributes:
        tokens_T, positions_T: as in MicroBatch, of the tokens held.
        scored_N: int64 places among the tokens held whose next-token distribution is read.
        targets_N: int64 the token that follows there, wherever it lies.
        numbers_N: int64 which of the micro-batch's scored positions these are.
        pieces: covers the tokens held without gaps, in order.
        order: int64 [the stream's tokens]: where each stands when all parts are put one after the other.
        first: where this part begins there.
    """

    tokens_T: Tensor
    positions_T: Tensor
    scored_N: Tensor
    targets_N: Tensor
    numbers_N: Tensor
    pieces: tuple[Piece, ...]
    order: Tensor
    first: int

    def to(self, device: torch.device) -> Part:
        """The same part with its tensors on `device`."""
        return replace(self, **_moved_tensors(self, device))


@dataclass(frozen=True)
class MicroBatch:
    """One flat stream for one forward pass.

    Attributes:
        tokens_T: int64 token ids, padding included.
        positions_T: int64 position ids: each response goes on where its prompt ends.
        segments: covers the stream without gaps, in order.
        scored_N: int64 stream positions whose next-token distribution is read (a shared prompt's end is read K times).
        targets_N: int64 the token that follows there.
        response_N: int64 the response, 0..R-1, that the target belongs to.
        place_N: int64 the target's place in its completion, from 1; 0 for a token of the prompt (see `lay_out`).
        num_completion_tokens_R: int64 tokens of each response, scored or not.
        last_R: int64 stream position of each response's last token.
        group_R: int64 the group, 0..G-1, of each response.
        rows: the group numbers in the store, one a group.
        places: each group's place in the step's batch.
        num_padding: stream tokens that belong to no group.
        numbers: float64 [R] by name: what the rows say of their responses, see `Group`.
        part: what this rank holds of the stream under context parallelism; None: all of it.
    """

    tokens_T: Tensor
    positions_T: Tensor
    segments: tuple[Segment, ...]
    scored_N: Tensor
    targets_N: Tensor
    response_N: Tensor
    place_N: Tensor
    num_completion_tokens_R: Tensor
    last_R: Tensor
    group_R: Tensor
    rows: tuple[int, ...]
    places: tuple[int, ...]
    num_padding: int
    numbers: Mapping[str, Tensor] = field(default_factory=dict)
    part: Part | None = None

    @property
    def held(self) -> MicroBatch | Part:
        """What this rank computes: its `tokens_T`, `positions_T`, `scored_N` and `targets_N`."""
        return self if self.part is None else self.part

    @property
    def num_tokens(self) -> int:
        """Stream tokens, padding left out."""
        return len(self.tokens_T) - self.num_padding

    @property
    def num_responses(self) -> int:
        """R."""
        return len(self.group_R)

    @property
    def first_G(self) -> Tensor:
        """int64, each group's first response."""
        num_responses_G = torch.bincount(self.group_R, minlength=len(self.rows))
        return num_responses_G.cumsum(0) - num_responses_G

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on `device`."""
        numbers = {name: numbers_R.to(device, non_blocking=True) for name, numbers_R in self.numbers.items()}
        part = None if self.part is None else self.part.to(device)
        return replace(self, numbers=numbers, part=part, **_moved_tensors(self, device))


def _moved_tensors(item: MicroBatch | Part, device: torch.device) -> dict[str, Any]:
    tensors = {f.name: getattr(item, f.name) for f in fields(item) if isinstance(getattr(item, f.name), Tensor)}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def lay_out(
    groups: Sequence[Group],
    rows: Sequence[int],
    share_prompts: bool = True,
    multiple_of: int = 1,
    padding_token: int = 0,
    score_prompts: bool = False,
    places: Sequence[int] | None = None,
) -> MicroBatch:
    """Lay groups out as ``[prompt | response 1 | … | response K]``, one after the other.

    Without `share_prompts`, or where a group's prompts differ, each response gets its own copy of its prompt.

    Args:
        rows: the groups' numbers in the store.
        places: each group's place in the step's batch; None: as they come.
        score_prompts: read the log-probs of the first response's prompt too (all its tokens but the first).
        multiple_of: the stream's length is padded up to a multiple of it (sequence parallelism cuts the stream evenly).
    """
    stream = _Stream(score_prompts)
    for number, group in enumerate(groups):
        if share_prompts and group.shares_prompt:
            prompt_start = stream.add_prompt(group.prompts[0])
            for response in group.responses:
                stream.add_response(group.prompts[0], prompt_start, response, number)
        else:
            for i, response in enumerate(group.responses):
                stream.add_sequence(group.prompt_of(i), response, number)
    num_padding = max(-stream.length % multiple_of, multiple_of if not groups else 0)
    if num_padding:
        stream.add_tokens(np.full(num_padding, padding_token), 0)
        stream.segments.append(Segment(stream.length - num_padding, stream.length))
    in_order = range(len(groups)) if places is None else places
    numbers = {
        name: torch.tensor([value for group in groups for value in group.numbers[name]], dtype=torch.float64)
        for name in (groups[0].numbers if groups else ())
    }
    return replace(
        stream.finish(tuple(int(row) for row in rows), tuple(int(place) for place in in_order), num_padding),
        numbers=numbers,
    )


class _Stream:
    """The lists a MicroBatch is made of, grown response by response."""

    def __init__(self, score_prompts: bool) -> None:
        self.score_prompts = score_prompts
        self.length = self.num_scored = 0
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.segments: list[Segment] = []
        self.scored: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.places: list[np.ndarray] = []
        self.scored_per_response: list[int] = []
        self.num_completion_tokens: list[int] = []
        self.last: list[int] = []
        self.group_of_response: list[int] = []

    def add_tokens(self, tokens: np.ndarray, first_position: int) -> int:
        start = self.length
        self.tokens.append(tokens)
        self.positions.append(np.arange(first_position, first_position + len(tokens)))
        self.length += len(tokens)
        return start

    def add_prompt(self, prompt: np.ndarray) -> int:
        start = self.add_tokens(prompt, 0)
        if len(prompt):
            self.segments.append(Segment(start, self.length))
        return start

    def add_response(self, prompt: np.ndarray, prompt_start: int, response: np.ndarray, group: int) -> None:
        start = self.add_tokens(response, len(prompt))
        self.segments.append(Segment(start, self.length, prompt_start, prompt_start + len(prompt)))
        self._score(prompt, prompt_start, response, start, group)

    def add_sequence(self, prompt: np.ndarray, response: np.ndarray, group: int) -> None:
        start = self.add_tokens(prompt, 0)
        middle = self.add_tokens(response, len(prompt))
        self.segments.append(Segment(start, self.length))
        self._score(prompt, start, response, middle, group)

    def _score(self, prompt: np.ndarray, prompt_start: int, response: np.ndarray, start: int, group: int) -> None:
        num_before = self.num_scored
        if self.score_prompts and len(prompt) > 1 and group not in self.group_of_response[-1:]:
            self._add_scored(np.arange(prompt_start, prompt_start + len(prompt) - 1), prompt[1:], np.zeros(len(prompt) - 1))
        within, places = np.arange(start, start + len(response) - 1), np.arange(1, len(response) + 1)
        if len(prompt):
            self._add_scored(np.concatenate([[prompt_start + len(prompt) - 1], within]), response, places)
        else:  # nothing stands before the first token, so that one has no log-prob (as in TRL)
            self._add_scored(within, response[1:], places[1:])
        self.scored_per_response.append(self.num_scored - num_before)
        self.num_completion_tokens.append(len(response))
        self.last.append(start + len(response) - 1)
        self.group_of_response.append(group)

    def _add_scored(self, positions: np.ndarray, targets: np.ndarray, places: np.ndarray) -> None:
        self.num_scored += len(positions)
        self.scored.append(positions)
        self.targets.append(targets)
        self.places.append(places)

    def finish(self, rows: tuple[int, ...], places: tuple[int, ...], num_padding: int) -> MicroBatch:
        def joined(arrays: list[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.concatenate(arrays).astype(np.int64) if arrays else np.zeros(0, np.int64))

        return MicroBatch(
            tokens_T=joined(self.tokens),
            positions_T=joined(self.positions),
            segments=tuple(self.segments),
            scored_N=joined(self.scored),
            targets_N=joined(self.targets),
            response_N=torch.from_numpy(np.repeat(np.arange(len(self.scored_per_response)), self.scored_per_response)),
            place_N=joined(self.places),
            num_completion_tokens_R=torch.tensor(self.num_completion_tokens, dtype=torch.int64),
            last_R=torch.tensor(self.last, dtype=torch.int64),
            group_R=torch.tensor(self.group_of_response, dtype=torch.int64),
            rows=rows,
            places=places,
            num_padding=num_padding,
        )
