"""Splits a micro-batch of pairs in halves: prompts with chosen answers in the first, rejected answers in the second. Pure.

A rejected answer that shares its prompt attends to the prompt's keys and values, which the first half computed; its first
token is scored in the first half, at the prompt's end. A rejected answer with a prompt of its own has it in the second half.

Axes: T stream tokens, N scored positions, Q tokens of shared prompts, which both halves attend to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megadpo.data.batches.micro_batch import MicroBatch, Segment, ShardSegment, StreamShard

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PairHalf(StreamShard):
    """One of the two halves, with padding of its own; `order` is -1 for the padding of the whole stream.

    Attributes:
        prompts_Q: int64, positions in the first half of the shared prompts' tokens; the same in both halves. The keys that
            the second half attends to are those of these tokens, followed by its own.
    """

    prompts_Q: Tensor

    @property
    def is_first(self) -> bool:
        """Whether this is the half with the prompts and chosen answers."""
        return self.first == 0


def with_halves(micro_batch: MicroBatch, multiple_of: int = 1, padding_token: int = 0) -> MicroBatch:
    """The micro-batch, whose groups are pairs, with its halves, each padded up to a multiple of `multiple_of` tokens."""
    segments = micro_batch.segments[:-1] if micro_batch.num_padding else micro_batch.segments
    segments_of: tuple[list[Segment], list[Segment]] = ([], [])
    for segment, is_rejected in zip(segments, _are_rejected(segments), strict=True):
        segments_of[is_rejected].append(segment)
    positions = [_positions(own) for own in segments_of]
    lengths = [-(-max(len(held), 1) // multiple_of) * multiple_of for held in positions]
    order_T = np.full(len(micro_batch.tokens_T), -1)
    for held, first in zip(positions, (0, lengths[0]), strict=True):
        order_T[held] = first + np.arange(len(held))
    prompts = list(dict.fromkeys((s.prompt_start, s.prompt_end) for s in segments_of[1] if s.prompt_end > s.prompt_start))
    prompts_Q = order_T[_positions([Segment(start, end) for start, end in prompts])]
    shard_segments = (
        _segments_of_first(segments_of[0], order_T),
        _segments_of_second(segments_of[1], prompts, len(prompts_Q)),
    )
    halves = []
    for number, held in enumerate(positions):
        first, num_padding = lengths[0] * number, lengths[number] - len(held)
        scored_N = order_T[micro_batch.scored_N.numpy()] - first
        scored_index_N = torch.from_numpy(np.flatnonzero((scored_N >= 0) & (scored_N < lengths[number])))
        half = PairHalf(
            tokens_T=_padded(micro_batch.tokens_T[held], torch.full((num_padding,), padding_token)),
            positions_T=_padded(micro_batch.positions_T[held], torch.arange(num_padding)),
            scored_N=torch.from_numpy(scored_N)[scored_index_N],
            targets_N=micro_batch.targets_N[scored_index_N],
            scored_index_N=scored_index_N,
            segments=(*shard_segments[number], *_padding_segment(len(held), num_padding, len(prompts_Q) * number)),
            order=torch.from_numpy(order_T),
            first=first,
            prompts_Q=torch.from_numpy(prompts_Q),
        )
        halves.append(half)
    return replace(micro_batch, halves=tuple(halves))


def _are_rejected(segments: Sequence[Segment]) -> list[bool]:
    """Whether each segment is a rejected answer. Chosen and rejected alternate, with shared prompts between them."""
    are_rejected, num_answers = [], 0
    for place, segment in enumerate(segments):
        following = segments[place + 1] if place + 1 < len(segments) else None
        is_prompt = (
            following is not None
            and segment.end > segment.start
            and (following.prompt_start, following.prompt_end) == (segment.start, segment.end)
        )
        are_rejected.append(not is_prompt and num_answers % 2 == 1)
        num_answers += not is_prompt
    return are_rejected


def _positions(segments: Sequence[Segment]) -> IntArray:
    """Stream positions of all tokens of the segments."""
    return np.concatenate([np.arange(segment.start, segment.end) for segment in segments] or [np.zeros(0, np.int64)])


def _segments_of_first(segments: Sequence[Segment], order_T: IntArray) -> list[ShardSegment]:
    """The first half's segments: keys are the half's own tokens."""
    shard_segments, at = [], 0
    for segment in segments:
        end, num_prompt = at + segment.end - segment.start, segment.prompt_end - segment.prompt_start
        prompt = int(order_T[segment.prompt_start]) if num_prompt else 0
        shard_segments.append(ShardSegment(at, end, at, end, prompt, prompt + num_prompt))
        at = end
    return shard_segments


def _segments_of_second(
    segments: Sequence[Segment], prompts: Sequence[tuple[int, int]], num_before: int
) -> list[ShardSegment]:
    """The second half's segments: keys are `num_before` tokens of the shared `prompts`, then the half's own tokens."""
    lengths = [end - start for start, end in prompts]
    start_of = dict(zip(prompts, np.cumsum([0, *lengths]).tolist(), strict=False))
    shard_segments, at = [], 0
    for segment in segments:
        end, num_prompt = at + segment.end - segment.start, segment.prompt_end - segment.prompt_start
        prompt = start_of[segment.prompt_start, segment.prompt_end] if num_prompt else 0
        shard_segments.append(ShardSegment(at, end, num_before + at, num_before + end, prompt, prompt + num_prompt))
        at = end
    return shard_segments


def _padding_segment(at: int, num_padding: int, num_before: int) -> list[ShardSegment]:
    end = at + num_padding
    return [ShardSegment(at, end, num_before + at, num_before + end)] if num_padding else []


def _padded(values_T: Tensor, padding: Tensor) -> Tensor:
    return torch.cat([values_T, padding.to(values_T.dtype)])
