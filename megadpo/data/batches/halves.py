"""Cuts a micro-batch of pairs into two streams: prompts and chosen answers in one, rejected answers in the other. Pure.

A rejected answer that shares its prompt reads the prompt's keys of the first stream, and its first token is scored there,
at the prompt's end. One that has a prompt of its own takes it along.

Axes: T stream tokens, N scored positions, Q tokens of the prompts that both streams read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megadpo.data.batches.micro_batch import MicroBatch, Part, Piece, Segment

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Half(Part):
    """One of the two streams, padded by itself. In `order` they stand one after the other; the whole's padding has no place.

    Attributes:
        prompts_Q: int64 places in the first stream of the tokens whose keys the second one's `pieces` read: there they
            stand before its own. The same in both.
    """

    prompts_Q: Tensor

    @property
    def is_first(self) -> bool:
        """Whether it has the chosen answers."""
        return self.first == 0


def with_halves(micro_batch: MicroBatch, multiple_of: int = 1, padding_token: int = 0) -> MicroBatch:
    """The micro-batch, whose groups are pairs, with its two streams, each padded up to a multiple of `multiple_of`."""
    segments = micro_batch.segments[:-1] if micro_batch.num_padding else micro_batch.segments
    lots: tuple[list[Segment], list[Segment]] = ([], [])
    for segment, is_rejected in zip(segments, _are_rejected(segments), strict=True):
        lots[is_rejected].append(segment)
    places = [_tokens(lot) for lot in lots]
    lengths = [-(-max(len(held), 1) // multiple_of) * multiple_of for held in places]
    order_T = np.full(len(micro_batch.tokens_T), -1)
    for held, first in zip(places, (0, lengths[0]), strict=True):
        order_T[held] = first + np.arange(len(held))
    prompts = list(dict.fromkeys((s.prompt_start, s.prompt_end) for s in lots[1] if s.prompt_end > s.prompt_start))
    prompts_Q = order_T[_tokens([Segment(start, end) for start, end in prompts])]
    pieces = _first_pieces(lots[0], order_T), _second_pieces(lots[1], prompts, len(prompts_Q))
    halves = []
    for number, held in enumerate(places):
        first, num_padding = lengths[0] * number, lengths[number] - len(held)
        scored_N = order_T[micro_batch.scored_N.numpy()] - first
        scored_index_N = torch.from_numpy(np.flatnonzero((scored_N >= 0) & (scored_N < lengths[number])))
        half = Half(
            tokens_T=_padded(micro_batch.tokens_T[held], torch.full((num_padding,), padding_token)),
            positions_T=_padded(micro_batch.positions_T[held], torch.arange(num_padding)),
            scored_N=torch.from_numpy(scored_N)[scored_index_N],
            targets_N=micro_batch.targets_N[scored_index_N],
            scored_index_N=scored_index_N,
            pieces=(*pieces[number], *_padding_piece(len(held), num_padding, len(prompts_Q) * number)),
            order=torch.from_numpy(order_T),
            first=first,
            prompts_Q=torch.from_numpy(prompts_Q),
        )
        halves.append(half)
    return replace(micro_batch, halves=tuple(halves))


def _are_rejected(segments: Sequence[Segment]) -> list[bool]:
    """Chosen and rejected answers take turns; a shared prompt, which is a segment by itself, goes with the chosen one."""
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


def _tokens(segments: Sequence[Segment]) -> IntArray:
    return np.concatenate([np.arange(segment.start, segment.end) for segment in segments] or [np.zeros(0, np.int64)])


def _first_pieces(segments: Sequence[Segment], order_T: IntArray) -> list[Piece]:
    pieces, at = [], 0
    for segment in segments:
        end, num_prompt = at + segment.end - segment.start, segment.prompt_end - segment.prompt_start
        prompt = int(order_T[segment.prompt_start]) if num_prompt else 0
        pieces.append(Piece(at, end, at, end, prompt, prompt + num_prompt))
        at = end
    return pieces


def _second_pieces(segments: Sequence[Segment], prompts: Sequence[tuple[int, int]], num_before: int) -> list[Piece]:
    lengths = [end - start for start, end in prompts]
    start_of = dict(zip(prompts, np.cumsum([0, *lengths]).tolist(), strict=False))
    pieces, at = [], 0
    for segment in segments:
        end, num_prompt = at + segment.end - segment.start, segment.prompt_end - segment.prompt_start
        prompt = start_of[segment.prompt_start, segment.prompt_end] if num_prompt else 0
        pieces.append(Piece(at, end, num_before + at, num_before + end, prompt, prompt + num_prompt))
        at = end
    return pieces


def _padding_piece(at: int, num_padding: int, num_before: int) -> list[Piece]:
    end = at + num_padding
    return [Piece(at, end, num_before + at, num_before + end)] if num_padding else []


def _padded(values_T: Tensor, padding: Tensor) -> Tensor:
    return torch.cat([values_T, padding.to(values_T.dtype)])
