"""A micro-batch: groups laid out as one flat token stream, with what attention and the head need to know of it.

Axes: T tokens of the stream, N scored positions, R responses of the micro-batch, P pairs, G groups, U runs (a prompt or a
response where it stands in the stream).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
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
    Or one of two halves, see data/halves.py.

    Attributes:
        tokens_T, positions_T: as in MicroBatch, of the tokens held.
        scored_N: int64 places among the tokens held whose next-token distribution is read.
        targets_N: int64 the token that follows there, wherever it lies.
        scored_index_N: int64 which of the micro-batch's scored positions these are.
        pieces: covers the tokens held without gaps, in order.
        order: int64 [the stream's tokens]: where each stands when all parts are put one after the other.
        first: where this part begins there.
    """

    tokens_T: Tensor
    positions_T: Tensor
    scored_N: Tensor
    targets_N: Tensor
    scored_index_N: Tensor
    pieces: tuple[Piece, ...]
    order: Tensor
    first: int

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Part:
        """The same part with its tensors changed."""
        return replace(self, **_changed_tensors(self, change))


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
        place_N: int64 the target's place in its completion, from 1; 0 for a token of the prompt (see data/layout.py).
        num_completion_tokens_R: int64 tokens of each response, scored or not.
        last_R: int64 stream position of each response's last token.
        group_R: int64 the group, 0..G-1, of each response.
        group_ids: each group's position in the store.
        batch_positions: each group's position in the step's batch.
        num_padding: stream tokens that belong to no group.
        row_values: float64 [R] by name: what the rows say of their responses, see `Group`.
        part: what this rank holds of the stream under context parallelism, or computes at once of halves; None: all of it.
        halves: the two streams as which the chosen and the rejected answers of pairs travel, see data/halves.py; empty:
            together.
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
    group_ids: tuple[int, ...]
    batch_positions: tuple[int, ...]
    num_padding: int
    row_values: Mapping[str, Tensor] = field(default_factory=dict)
    part: Part | None = None
    halves: tuple[Part, ...] = ()

    def half(self, number: int) -> MicroBatch:
        """The same micro-batch, of which one of its halves is computed; itself where it has none."""
        return replace(self, part=self.halves[number], halves=()) if self.halves else self

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
        num_responses_G = torch.bincount(self.group_R, minlength=len(self.group_ids))
        return num_responses_G.cumsum(0) - num_responses_G

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on `device`."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """The same micro-batch in memory from which a GPU copies without the processor waiting."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        row_values = {name: change(values_R) for name, values_R in self.row_values.items()}
        part = None if self.part is None else self.part.with_tensors(change)
        halves = tuple(half.with_tensors(change) for half in self.halves)
        return replace(self, row_values=row_values, part=part, halves=halves, **_changed_tensors(self, change))


def _changed_tensors(item: MicroBatch | Part, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    tensors = {f.name: getattr(item, f.name) for f in fields(item) if isinstance(getattr(item, f.name), Tensor)}
    return {name: change(tensor) for name, tensor in tensors.items()}
