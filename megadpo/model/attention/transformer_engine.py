"""Attention of a packed stream by TransformerEngine on CUDA, which chooses among its own kernels, cuDNN's and flash-attn.

Axes: T stream tokens, S keys of the stream, A query heads, K key-value heads, D head dimension.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megadpo.data.batches.micro_batch import Segment, ShardSegment
from megadpo.model.attention.base import AttentionBackend, AttentionNeeds
from megadpo.model.attention.head_dims import cut_to, of_one_dim
from megadpo.model.attention.sequences import Sequences, sequences_of, why_not_on_this_gpu, why_not_these_scores


class TransformerEngineBackend:
    """`DotProductAttention` without parameters, in its "thd" format."""

    name = "transformer_engine"

    def why_not(self, needs: AttentionNeeds) -> str | None:
        """Without a GPU, where the library is not installed or has other arguments, or for softcaps and sinks."""
        return why_not_on_this_gpu(needs) or why_not_these_scores(needs) or _why_not_installed()

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
        assert softcap is None and sinks_A is None
        value_dim = value.shape[2]
        query, key, value = of_one_dim(query, key, value)
        key, value = prepared.gathered(key, value)
        output = _module(query.shape[1], key.shape[1], query.shape[2], scale)(
            query,
            key,
            value,
            qkv_format="thd",
            cu_seqlens_q=prepared.query_starts,
            cu_seqlens_kv=prepared.key_starts,
            max_seqlen_q=prepared.max_queries,
            max_seqlen_kv=prepared.max_keys,
            attn_mask_type="padding_causal_bottom_right",
            window_size=prepared.reach,
        )
        return cut_to(output.view(query.shape), value_dim)


def _why_not_installed() -> str | None:
    if importlib.util.find_spec("transformer_engine") is None:
        return "TransformerEngine is not installed"
    from transformer_engine.pytorch import DotProductAttention

    needed = {"attn_mask_type", "window_size", "cu_seqlens_kv", "max_seqlen_kv"}
    missing = needed - inspect.signature(DotProductAttention.forward).parameters.keys()
    return f"the installed one does not take {', '.join(sorted(missing))}" if missing else None


@functools.cache
def _module(num_heads: int, num_key_value_heads: int, head_dim: int, scale: float) -> Any:
    """Without parameters, so that layers share it."""
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        num_heads,
        head_dim,
        num_gqa_groups=num_key_value_heads,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal_bottom_right",
        softmax_scale=scale,
    )


BACKEND: AttentionBackend = TransformerEngineBackend()
