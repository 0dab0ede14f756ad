"""Cuts a micro-batch's stream over context-parallel ranks: equal numbers of tokens, near-equal work of attention. Pure.

A token's attention costs as many query-key pairs as it sees keys, so the end of a long segment is dearer than its
beginning. The stream is cut into chunks of equal length, and the dearest chunk goes to the cheapest part that still has
room. Of one long segment that is the well-known zig-zag (first and last chunk together); of many segments it is whatever
balances them. Everything but attention (norms, projections, MLPs) costs the same for every token.

Axes: T stream tokens, N scored positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from megadpo.data.batches.micro_batch import MicroBatch, Part, Piece, Segment

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

CHUNKS_PER_PART = (2, 4, 8, 16)
"""Tried one after the other until the parts are balanced: every chunk costs attention a call of its own."""

BALANCED = 1.02
"""Balanced enough: the dearest part above the mean."""

LEAST_CHUNK = 16
"""Tokens; no chunk is cut smaller for balance's sake."""


def with_part(micro_batch: MicroBatch, num_parts: int, number: int) -> MicroBatch:
    """The micro-batch with part `number` of `num_parts`; the stream's length must be a multiple of `num_parts`."""
    parts = cut(token_costs(micro_batch.segments), num_parts)
    num_held = len(micro_batch.tokens_T) // num_parts
    stream_places = np.concatenate([np.arange(chunk.start, chunk.stop) for part in parts for chunk in part])
    order_T = np.empty_like(stream_places)
    order_T[stream_places] = np.arange(len(order_T))
    first = number * num_held
    held_T = torch.from_numpy(stream_places[first : first + num_held])
    scored_N = order_T[micro_batch.scored_N.numpy()] - first
    scored_index_N = np.flatnonzero((scored_N >= 0) & (scored_N < num_held))
    part = Part(
        tokens_T=micro_batch.tokens_T[held_T],
        positions_T=micro_batch.positions_T[held_T],
        scored_N=torch.from_numpy(scored_N[scored_index_N]),
        targets_N=micro_batch.targets_N[torch.from_numpy(scored_index_N)],
        scored_index_N=torch.from_numpy(scored_index_N),
        pieces=tuple(_pieces(parts[number], micro_batch.segments)),
        order=torch.from_numpy(order_T),
        first=first,
    )
    return replace(micro_batch, part=part)


def token_costs(segments: Sequence[Segment]) -> FloatArray:
    """float64 [T]: the keys that each token of the stream sees (sliding windows are not taken into account)."""
    costs = [np.arange(1, s.end - s.start + 1, dtype=np.float64) + (s.prompt_end - s.prompt_start) for s in segments]
    return np.concatenate(costs)


def cut(costs_T: FloatArray, num_parts: int) -> list[list[range]]:
    """The chunks of the stream that each part gets, in the stream's order; all parts have the same number of tokens."""
    assert len(costs_T) % num_parts == 0
    num_held = len(costs_T) // num_parts
    up_to = np.concatenate([[0.0], costs_T.cumsum()])
    mean = up_to[-1] / num_parts
    best: tuple[float, list[list[range]]] | None = None
    for chunks_per_part in CHUNKS_PER_PART:
        if best is not None and (best[0] <= BALANCED * mean or num_held // chunks_per_part < LEAST_CHUNK):
            break
        parts = _deal(up_to, num_parts, chunks_per_part)
        dearest = max(sum(up_to[chunk.stop] - up_to[chunk.start] for chunk in part) for part in parts)
        if best is None or dearest < best[0]:
            best = dearest, parts
    assert best is not None
    return [_joined(part) for part in best[1]]


def _deal(up_to: FloatArray, num_parts: int, chunks_per_part: int) -> list[list[range]]:
    """Equal chunks, the dearest first, each to the cheapest part with room; then what is left, equally long for each."""
    num_held = (len(up_to) - 1) // num_parts
    length, rest = divmod(num_held, chunks_per_part)
    num_chunks = num_parts * chunks_per_part if length else 0
    whole = [range(i * length, (i + 1) * length) for i in range(num_chunks)]
    start = num_chunks * length
    rests = [range(start + i * rest, start + (i + 1) * rest) for i in range(num_parts if rest else 0)]
    parts: list[list[range]] = [[] for _ in range(num_parts)]
    costs = [0.0] * num_parts
    for chunks, room in ((whole, chunks_per_part), (rests, chunks_per_part * bool(length) + 1)):
        for chunk in sorted(chunks, key=lambda c: (up_to[c.start] - up_to[c.stop], c.start)):
            number = min((n for n in range(num_parts) if len(parts[n]) < room), key=lambda n: (costs[n], n))
            parts[number].append(chunk)
            costs[number] += up_to[chunk.stop] - up_to[chunk.start]
    return parts


def _joined(chunks: Sequence[range]) -> list[range]:
    """Chunks in order, those that touch each other as one."""
    joined: list[range] = []
    for chunk in sorted(chunks, key=lambda c: c.start):
        if joined and joined[-1].stop == chunk.start:
            joined[-1] = range(joined[-1].start, chunk.stop)
        else:
            joined.append(chunk)
    return joined


def _pieces(chunks: Sequence[range], segments: Sequence[Segment]) -> list[Piece]:
    """What the segments become on the part that holds `chunks`."""
    pieces, place = [], 0
    ends = np.array([segment.end for segment in segments])
    for chunk in chunks:
        at = chunk.start
        for segment in segments[int(np.searchsorted(ends, at, side="right")) :]:
            if at >= chunk.stop:
                break
            end = min(chunk.stop, segment.end)
            pieces.append(Piece(place, place + end - at, segment.start, end, segment.prompt_start, segment.prompt_end))
            place, at = place + end - at, end
    return pieces
