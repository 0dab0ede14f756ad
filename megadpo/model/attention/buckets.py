"""Attention of a packed stream by torch's scaled_dot_product_attention over padded batches of segments of about one length:
on any device but a CPU, in any dtype.

A segment's keys are those of its prompt and its own. Segments whose numbers of keys and queries are alike are one batch,
padded to the largest of them, in which a mask says which query sees which key. What padding gives is dropped, and gets no
gradient. Softcaps and sinks, which torch's function lacks, are computed by explicit.py.

Axes: T stream tokens, S keys of the stream, A query heads, K key-value heads, D head dimension; B segments of a batch, L and
M their queries and keys with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megadpo.data.batches.micro_batch import Segment, ShardSegment
from megadpo.model.attention.base import AttentionBackend, AttentionNeeds
from megadpo.model.attention.cpu_blocks import additive
from megadpo.model.attention.explicit import explicit_attention
from megadpo.model.attention.sequences import copied_to

FILLED = 0.7
"""A batch takes segments of at least this part of its largest one's queries times keys; the rest is padding."""

MAX_BATCH = 1 << 24
"""Queries times keys of a batch, all segments together: the size of its mask. A segment that is larger is alone."""


@dataclass(frozen=True)
class Bucket:
    """Segments of about one length.

    Attributes:
        query_BL, key_BM: int64, places in the stream; a row's padding repeats its first one.
        real: int64, places in `query_BL`, flattened, that are no padding.
        mask: [B, 1, L, M], added to the scores; None: every segment is a causal square.
    """

    query_BL: Tensor
    key_BM: Tensor
    real: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Buckets:
    """A stream's segments.

    Attributes:
        order_T: int64, for each query of the stream its place among the real ones of all buckets, one after the other.
    """

    buckets: tuple[Bucket, ...]
    order_T: Tensor


class BucketsBackend:
    """One call of scaled_dot_product_attention a bucket."""

    name = "buckets"

    def why_not(self, needs: AttentionNeeds) -> str | None:
        """Anywhere but on a CPU, which has blocks without padding."""
        return "that is for GPUs; a CPU has cpu_flash" if needs.device.type == "cpu" else None

    def prepare(self, segments: Sequence[Segment | ShardSegment], window: int | None, key: Tensor) -> Buckets:
        """Index tensors and masks of all buckets, on the keys' device."""
        lots = _lots([segment for segment in segments if segment.end > segment.start])
        order = np.concatenate([np.arange(s.start, s.end) for lot in lots for s in lot] or [np.arange(0)])
        buckets = tuple(_bucket(lot, window, key) for lot in lots)
        return Buckets(buckets, copied_to(key.device, np.argsort(order)))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prepared: Buckets,
        scale: float,
        softcap: float | None = None,
        sinks_A: Tensor | None = None,
    ) -> Tensor:
        """[T, A, D of the values], from query [T, A, D], key and value [S, K, D]."""
        num_sharing = query.shape[1] // key.shape[1]
        outputs = [query.new_empty(0, query.shape[1], value.shape[2])]
        for bucket in prepared.buckets:
            # Torch's kernel that takes a mask has as many keys as queries; without, it would compute in steps.
            keys, values = (_in_batch(x, bucket.key_BM).repeat_interleave(num_sharing, dim=1) for x in (key, value))
            operands = (_in_batch(query, bucket.query_BL), keys, values)
            if softcap is not None or sinks_A is not None:
                output_BALD = explicit_attention(*operands, bucket.mask, scale, softcap, sinks_A)
            else:
                output_BALD = F.scaled_dot_product_attention(
                    *operands, attn_mask=bucket.mask, is_causal=bucket.mask is None, scale=scale
                )
            outputs.append(output_BALD.transpose(1, 2).flatten(0, 1).index_select(0, bucket.real))
        return torch.cat(outputs).index_select(0, prepared.order_T)


def _in_batch(rows: Tensor, places_BN: Tensor) -> Tensor:
    """[B, heads, N, D] of [stream, heads, D]."""
    return rows.index_select(0, places_BN.flatten()).unflatten(0, places_BN.shape).transpose(1, 2)


def _sizes(segment: Segment | ShardSegment) -> tuple[int, int]:
    """Keys and queries."""
    num_keys = segment.keys.stop - segment.keys.start + segment.prompt_end - segment.prompt_start
    return num_keys, segment.end - segment.start


def _lots(segments: Sequence[Segment | ShardSegment]) -> list[list[Segment | ShardSegment]]:
    """Segments of about equal sizes together, so that little is padding."""
    lots: list[list[Segment | ShardSegment]] = []
    most_keys = most_queries = 0
    for segment in sorted(segments, key=_sizes, reverse=True):
        num_keys, num_queries = _sizes(segment)
        largest = most_keys * max(most_queries, num_queries)
        lot = lots[-1] if lots else []
        least = min(keys * queries for keys, queries in map(_sizes, [*lot, segment]))
        if lot and least >= FILLED * largest and (len(lot) + 1) * largest <= MAX_BATCH:
            lot.append(segment)
            most_queries = max(most_queries, num_queries)
        else:
            lots.append([segment])
            most_keys, most_queries = num_keys, num_queries
    return lots


def _bucket(lot: Sequence[Segment | ShardSegment], window: int | None, key: Tensor) -> Bucket:
    sizes = [_sizes(segment) for segment in lot]
    query_BL, real_BL = _padded([np.arange(segment.start, segment.end) for segment in lot])
    key_BM, _ = _padded(
        [np.r_[segment.prompt_start : segment.prompt_end, segment.keys.start : segment.keys.stop] for segment in lot]
    )
    mask = None
    if any(keys != queries or (window is not None and keys > window) for keys, queries in sizes):
        mask = additive(_visible(sizes, window, key.device), key.dtype)[:, None]
    return Bucket(
        copied_to(key.device, query_BL),
        copied_to(key.device, key_BM),
        copied_to(key.device, np.flatnonzero(real_BL)),
        mask,
    )


def _padded(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the longest one's length, and where they are no padding."""
    longest = max(map(len, rows))
    padded = np.stack([np.pad(row, (0, longest - len(row)), constant_values=row[0]) for row in rows])
    return padded, np.arange(longest) < np.array([len(row) for row in rows])[:, None]


def _visible(sizes: Sequence[tuple[int, int]], window: int | None, device: torch.device) -> Tensor:
    """bool [B, L, M]: a segment's last query sees all of its keys, each one before one less, and no more than `window`.

    So no real query sees padding, and padding sees something, if it is only its like.
    """
    most_keys, most_queries = (max(numbers) for numbers in zip(*sizes, strict=True))
    before_B = copied_to(device, np.array([keys - queries for keys, queries in sizes]))
    query_L, key_M = (torch.arange(most, device=device) for most in (most_queries, most_keys))
    last_BL1 = (before_B[:, None] + query_L).clamp(max=most_keys - 1)[..., None]
    visible = key_M <= last_BL1
    return visible if window is None else visible & (key_M > last_BL1 - window)


BACKEND: AttentionBackend = BucketsBackend()
