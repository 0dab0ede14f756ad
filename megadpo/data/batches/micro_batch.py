"""A micro-batch: groups collated into one flat token stream, with what attention and the head need to know of it.

Axes: T tokens of the stream, L tokens of a shard, N scored positions, R responses of the micro-batch, P pairs, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """Consecutive tokens of the stream with one attention pattern: causal among themselves, full over a shared prompt.

    Attributes:
        start, end: the tokens [start, end) of the stream, which are queries and keys.
        prompt_start, prompt_end: the shared prompt's tokens in the stream, further keys that every query sees; equal (no
            token) where the segment has no shared prompt.
    """

    start: int
    end: int
    prompt_start: int = 0
    prompt_end: int = 0

    @property
    def keys(self) -> slice:
        """The keys of the segment itself, in the stream."""
        return slice(self.start, self.end)


@dataclass(frozen=True)
class ShardSegment:
    """Consecutive tokens of a shard that belong to one segment of the stream.

    Attributes:
        start, end: the queries [start, end), counted in the shard.
        keys_start, keys_end: their keys of the same segment, counted in the keys that the shard attends to (under context
            parallelism the whole stream): the last query sees all of them, each query before it one key less.
        prompt_start, prompt_end: further keys that every query sees (the shared prompt), counted likewise; equal where
            there are none.
    """

    start: int
    end: int
    keys_start: int
    keys_end: int
    prompt_start: int = 0
    prompt_end: int = 0

    @property
    def keys(self) -> slice:
        """The keys of the segment itself."""
        return slice(self.keys_start, self.keys_end)


@dataclass(frozen=True)
class StreamShard:
    """The tokens of a micro-batch's stream that one forward pass computes, where that is not all of them.

    Either one context-parallel rank's shard (see data/batches/context_shard.py; all shards have the same length), or one
    half of the pairs (see data/batches/halves.py).

    Attributes:
        tokens_T, positions_T: int64 [L], as in MicroBatch, of the shard's tokens.
        scored_N: int64, scored positions that lie in the shard, counted in the shard.
        targets_N: int64, the token that follows each of them, in whichever shard it lies.
        scored_index_N: int64, which of the micro-batch's scored positions these are.
        segments: covers the shard without gaps, in order.
        order: int64 [T], where each token of the stream is when all shards are concatenated.
        first: where this shard begins in that concatenation.
    """

    tokens_T: Tensor
    positions_T: Tensor
    scored_N: Tensor
    targets_N: Tensor
    scored_index_N: Tensor
    segments: tuple[ShardSegment, ...]
    order: Tensor
    first: int

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> StreamShard:
        """The same shard with its tensors changed."""
        return replace(self, **_changed_tensors(self, change))


@dataclass(frozen=True)
class MicroBatch:
    """One flat stream of tokens.

    Attributes:
        tokens_T: int64 token ids, padding included.
        positions_T: int64 position ids: each response goes on where its prompt ends.
        segments: covers the stream without gaps, in order.
        scored_N: int64 stream positions whose next-token distribution is read (a shared prompt's end is read K times).
        targets_N: int64 the token that follows there.
        response_N: int64 the response, 0..R-1, that the target belongs to.
        place_N: int64 the target's place in its completion, from 1; 0 for a token of the prompt (see
            data/batches/collate.py).
        num_completion_tokens_R: int64 tokens of each response, scored or not.
        last_R: int64 stream position of each response's last token.
        group_R: int64 the group, 0..G-1, of each response.
        group_ids: each group's position in the store.
        batch_positions: each group's position in the step's batch.
        num_padding: stream tokens that belong to no group.
        row_values: float64 [R] by name: what the rows say of their responses, see `Group`.
        shard: the tokens that this rank computes under context parallelism, or the half that is computed; None: all.
        halves: the shards with the prompts and chosen answers, and with the rejected answers, where these go through the
            pipeline one after the other (see data/batches/halves.py); empty: together.
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
    shard: StreamShard | None = None
    halves: tuple[StreamShard, ...] = ()

    def half(self, number: int) -> MicroBatch:
        """The same micro-batch with one of its halves as the shard to compute; itself where it has no halves."""
        return replace(self, shard=self.halves[number], halves=()) if self.halves else self

    @property
    def local(self) -> MicroBatch | StreamShard:
        """What this rank computes: has `tokens_T`, `positions_T`, `scored_N` and `targets_N`."""
        return self if self.shard is None else self.shard

    def local_places(self) -> Tensor:
        """int64 [L]: where in the stream each token of `local` is; -1 for padding of a shard."""
        if self.shard is None:
            return torch.arange(len(self.tokens_T), device=self.tokens_T.device)
        place_in_shard_T = self.shard.order - self.shard.first
        is_here_T = (place_in_shard_T >= 0) & (place_in_shard_T < len(self.shard.tokens_T))
        places_L = torch.full_like(self.shard.tokens_T, -1)
        places_L[place_in_shard_T[is_here_T]] = is_here_T.nonzero().flatten()
        return places_L

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
        num_responses_G = counted(self.group_R, len(self.group_ids))
        return num_responses_G.cumsum(0) - num_responses_G

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on `device`."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """The same micro-batch in pinned memory, from which copies to a GPU are asynchronous."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        row_values = {name: change(values_R) for name, values_R in self.row_values.items()}
        shard = None if self.shard is None else self.shard.with_tensors(change)
        halves = tuple(half.with_tensors(change) for half in self.halves)
        return replace(self, row_values=row_values, shard=shard, halves=halves, **_changed_tensors(self, change))


def counted(numbers: Tensor, size: int, counts: Tensor | None = None) -> Tensor:
    """int64 [size]: how often each of 0..size-1 is among `numbers`, of those that count.

    As torch.bincount, which on a GPU waits for the largest number.
    """
    ones = torch.ones_like(numbers) if counts is None else counts.to(numbers.dtype)
    return numbers.new_zeros(size).scatter_add_(0, numbers, ones)


def _changed_tensors(item: MicroBatch | StreamShard, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    tensors = {f.name: getattr(item, f.name) for f in fields(item) if isinstance(getattr(item, f.name), Tensor)}
    return {name: change(tensor) for name, tensor in tensors.items()}
