"""Attention of a packed stream by torch's own kernel for sequences, torch.nn.attention.varlen, on CUDA.

Axes: T stream tokens, S keys of the stream, A query heads, K key-value heads, D head dimension.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from megadpo.data.batches.micro_batch import Segment, ShardSegment
from megadpo.model.attention.base import AttentionBackend, AttentionNeeds
from megadpo.model.attention.sequences import Sequences, sequences_of, why_not_on_this_gpu


class VarlenBackend:
    """`varlen_attn`, whose "causal" is a window that ends at the query."""

    name = "varlen"

    def why_not(self, needs: AttentionNeeds) -> str | None:
        """Without a GPU, or where this torch's function has other arguments."""
        return why_not_on_this_gpu(needs) or _why_not_this_torch()

    def prepare(self, segments: Sequence[Segment | ShardSegment], window: int | None, key: Tensor) -> Sequences:
        """See `sequences_of`."""
        return sequences_of(segments, window, len(key), key.device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, prepared: Sequences, scale: float) -> Tensor:
        """[T, A, D], from query [T, A, D], key and value [S, K, D]."""
        from torch.nn.attention.varlen import varlen_attn

        key, value = prepared.gathered(key, value)
        output = varlen_attn(
            query,
            key,
            value,
            prepared.query_starts,
            prepared.key_starts,
            prepared.max_queries,
            prepared.max_keys,
            scale=scale,
            window_size=prepared.reach,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        assert isinstance(output, Tensor)
        return output


def _why_not_this_torch() -> str | None:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} does not have that"
    from torch.nn.attention.varlen import varlen_attn

    missing = {"scale", "window_size", "enable_gqa"} - inspect.signature(varlen_attn).parameters.keys()
    return f"that of torch {torch.__version__} does not take {', '.join(sorted(missing))}" if missing else None


BACKEND: AttentionBackend = VarlenBackend()
