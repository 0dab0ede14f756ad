"""Attention of a packed stream by torch's own kernel for sequences, torch.nn.attention.varlen, on CUDA.

Its function has gained arguments from torch 2.10 to 2.12. What an older one lacks is done before the call: key-value heads
are repeated, queries scaled; only windows cannot be.

Axes: T stream tokens, S keys of the stream, A query heads, K key-value heads, D head dimension.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megadpo.data.batches.micro_batch import Segment, ShardSegment
from megadpo.model.attention.base import AttentionBackend, AttentionNeeds
from megadpo.model.attention.head_dims import cut_to, of_one_dim
from megadpo.model.attention.sequences import Sequences, sequences_of, why_not_on_this_gpu, why_not_these_scores


class VarlenBackend:
    """`varlen_attn`."""

    name = "varlen"

    def why_not(self, needs: AttentionNeeds) -> str | None:
        """Without a GPU, or where this torch does not have the function or it lacks what the model has."""
        return why_not_on_this_gpu(needs) or why_not_these_scores(needs) or _why_not_this_torch(needs.has_windows)

    def prepare(self, segments: Sequence[Segment | ShardSegment], window: int | None, key: Tensor) -> Sequences:
        """See `sequences_of`."""
        return sequences_of(segments, window, len(key), key.device)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prepared: Sequences,
        scale: float,
        softcap: float | None = None,
        sinks_A: Tensor | None = None,
    ) -> Tensor:
        """[T, A, D of the values], from query [T, A, D], key and value [S, K, D]."""
        from torch.nn.attention.varlen import varlen_attn

        assert softcap is None and sinks_A is None
        taken = _arguments(varlen_attn)
        options: dict[str, Any] = {}
        if "window_size" in taken:
            options["window_size"] = prepared.reach  # "causal" is a window that ends at the query
        else:
            assert prepared.reach == (-1, 0)
            options["is_causal"] = True
        if "scale" in taken:
            options["scale"] = scale
        else:
            query = _scaled(query, scale * math.sqrt(query.shape[2]))
        value_dim = value.shape[2]
        query, key, value = of_one_dim(query, key, value)
        num_sharing = query.shape[1] // key.shape[1]
        if "enable_gqa" in taken:
            options["enable_gqa"] = num_sharing > 1
            num_sharing = 1
        key, value = prepared.gathered(key, value, num_copies=num_sharing)
        starts = (prepared.query_starts, prepared.key_starts, prepared.max_queries, prepared.max_keys)
        output = varlen_attn(query, key, value, *starts, **options)
        assert isinstance(output, Tensor)
        return cut_to(output, value_dim)


def _scaled(query: Tensor, factor: float) -> Tensor:
    """For a kernel that multiplies scores by 1 / sqrt(D), whatever is asked; most models ask for just that."""
    return query if math.isclose(factor, 1.0) else query * factor


def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _why_not_this_torch(has_windows: bool) -> str | None:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} does not have that"
    from torch.nn.attention.varlen import varlen_attn

    taken = _arguments(varlen_attn)
    if "window_size" in taken:
        return None
    if has_windows:
        return f"that of torch {torch.__version__} does not take the sliding windows that this model has"
    return None if "is_causal" in taken else f"that of torch {torch.__version__} takes neither window_size nor is_causal"


BACKEND: AttentionBackend = VarlenBackend()
