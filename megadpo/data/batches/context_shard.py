"""Shards a micro-batch's stream over context-parallel ranks: equal token counts, near-equal attention work. Pure.

A token's attention costs one query-key pair for each key it sees, so tokens at the end of a long segment cost more than
those at its beginning. The stream is cut into chunks of equal length, and the costliest chunk goes to the cheapest shard
that still has room. For one long segment this is the well-known zig-zag (first and last chunk together). Everything but
attention (norms, projections, MLPs) costs the same for every token.

Axes: T stream tokens, N scored positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from megadpo.data.batches.micro_batch import MicroBatch, Segment, ShardSegment, StreamShard

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

CHUNKS_PER_SHARD = (2, 4, 8, 16)
"""Tried one after the other until the shards are balanced; every chunk costs a separate call of attention."""

BALANCED = 1.02
"""Shards are balanced where the costliest one is at most this many times the mean."""

MIN_CHUNK_TOKENS = 16
"""Chunks are not made smaller than this to improve the balance."""


def with_context_shard(micro_batch: MicroBatch, num_shards: int, number: int) -> MicroBatch:
    """The micro-batch with shard `number` of `num_shards`; the stream's length must be a multiple of `num_shards`."""
    shards = shard_stream(token_costs(micro_batch.segments), num_shards)
    num_held = len(micro_batch.tokens_T) // num_shards
    stream_positions = np.concatenate([np.arange(chunk.start, chunk.stop) for shard in shards for chunk in shard])
    order_T = np.empty_like(stream_positions)
    order_T[stream_positions] = np.arange(len(order_T))
    first = number * num_held
    held_T = torch.from_numpy(stream_positions[first : first + num_held])
    scored_N = order_T[micro_batch.scored_N.numpy()] - first
    scored_index_N = np.flatnonzero((scored_N >= 0) & (scored_N < num_held))
    shard = StreamShard(
        tokens_T=micro_batch.tokens_T[held_T],
        positions_T=micro_batch.positions_T[held_T],
        scored_N=torch.from_numpy(scored_N[scored_index_N]),
        targets_N=micro_batch.targets_N[torch.from_numpy(scored_index_N)],
        scored_index_N=torch.from_numpy(scored_index_N),
        segments=tuple(_shard_segments(shards[number], micro_batch.segments)),
        order=torch.from_numpy(order_T),
        first=first,
    )
    return replace(micro_batch, shard=shard)


def token_costs(segments: Sequence[Segment]) -> FloatArray:
    """float64 [T]: the keys that each token of the stream sees (sliding windows are left out of account)."""
    costs = [np.arange(1, s.end - s.start + 1, dtype=np.float64) + (s.prompt_end - s.prompt_start) for s in segments]
    return np.concatenate(costs)


def shard_stream(costs_T: FloatArray, num_shards: int) -> list[list[range]]:
    """The chunks [start, stop) of the stream in each shard, in the stream's order; all shards have the same length.

    Args:
        costs_T: float64, attention work of each token; T is a multiple of `num_shards`.
    """
    assert len(costs_T) % num_shards == 0
    num_held = len(costs_T) // num_shards
    up_to = np.concatenate([[0.0], costs_T.cumsum()])
    mean = up_to[-1] / num_shards
    best: tuple[float, list[list[range]]] | None = None
    for chunks_per_shard in CHUNKS_PER_SHARD:
        if best is not None and (best[0] <= BALANCED * mean or num_held // chunks_per_shard < MIN_CHUNK_TOKENS):
            break
        shards = _assign_chunks(up_to, num_shards, chunks_per_shard)
        costliest = max(sum(up_to[chunk.stop] - up_to[chunk.start] for chunk in shard) for shard in shards)
        if best is None or costliest < best[0]:
            best = costliest, shards
    assert best is not None
    return [_merged(shard) for shard in best[1]]


def _assign_chunks(up_to: FloatArray, num_shards: int, chunks_per_shard: int) -> list[list[range]]:
    """Equal chunks, costliest first, each to the cheapest shard with room; then the remaining tokens, as many to each."""
    num_held = (len(up_to) - 1) // num_shards
    length, rest = divmod(num_held, chunks_per_shard)
    num_chunks = num_shards * chunks_per_shard if length else 0
    whole = [range(i * length, (i + 1) * length) for i in range(num_chunks)]
    start = num_chunks * length
    rests = [range(start + i * rest, start + (i + 1) * rest) for i in range(num_shards if rest else 0)]
    shards: list[list[range]] = [[] for _ in range(num_shards)]
    costs = [0.0] * num_shards
    for chunks, room in ((whole, chunks_per_shard), (rests, chunks_per_shard * bool(length) + 1)):
        for chunk in sorted(chunks, key=lambda c: (up_to[c.start] - up_to[c.stop], c.start)):
            number = min((n for n in range(num_shards) if len(shards[n]) < room), key=lambda n: (costs[n], n))
            shards[number].append(chunk)
            costs[number] += up_to[chunk.stop] - up_to[chunk.start]
    return shards


def _merged(chunks: Sequence[range]) -> list[range]:
    """The chunks in order, adjacent ones merged."""
    merged: list[range] = []
    for chunk in sorted(chunks, key=lambda c: c.start):
        if merged and merged[-1].stop == chunk.start:
            merged[-1] = range(merged[-1].start, chunk.stop)
        else:
            merged.append(chunk)
    return merged


def _shard_segments(chunks: Sequence[range], segments: Sequence[Segment]) -> list[ShardSegment]:
    """The segments, and parts of segments, that lie in the shard made of `chunks`."""
    shard_segments, place = [], 0
    ends = np.array([segment.end for segment in segments])
    for chunk in chunks:
        at = chunk.start
        for segment in segments[int(np.searchsorted(ends, at, side="right")) :]:
            if at >= chunk.stop:
                break
            end = min(chunk.stop, segment.end)
            num_tokens, prompt = end - at, (segment.prompt_start, segment.prompt_end)
            shard_segments.append(ShardSegment(place, place + num_tokens, segment.start, end, *prompt))
            place, at = place + num_tokens, end
    return shard_segments
