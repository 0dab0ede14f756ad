"""Megatron's self-attention, which need not keep its queries twice: as they lie in the packed projection, and copied.

The projection gives queries, keys and values of each group of heads side by side, [T, 1, K, (A / K + 2) D]. Megatron copies
the queries out of it, and their norm keeps the copy; keys and values are views of the projection, which so stays too. A norm
that reads views needs no copy; without one, it is made again where results of cheap operations are.

Axes: T stream tokens, A query heads and K key-value heads of this tensor rank, D head dimension.
"""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megadpo.model.norm import RMSNorm
from megadpo.model.recompute import is_remembering, recomputable


class PackedSelfAttention(SelfAttention):
    """Queries are normed where they lie, by norms that can do so; else copied, and where that is wanted copied again."""

    def get_query_key_value_tensors(self, hidden_states: Tensor, *unused: Any, **options: Any) -> Any:
        """Query [T, 1, A, D], key and value [T, 1, K, D], normed where the model has these norms; where it has one, the gate
        [T, 1, A, D], too."""
        if options.get("output_gate", False):
            return super().get_query_key_value_tensors(hidden_states, *unused, **options)
        reads_views = isinstance(self.q_layernorm, RMSNorm) and self.q_layernorm.reads_views
        if not (reads_views or is_remembering()) or self.config.num_query_groups < self.world_size:
            return super().get_query_key_value_tensors(hidden_states, *unused, **options)
        assert options.get("split_qkv", True)
        head_dim = self.hidden_size_per_attention_head
        mixed, _ = self.linear_qkv(hidden_states)
        grouped = mixed.view(*mixed.shape[:-1], self.num_query_groups_per_partition, -1)
        query, key, value = grouped.split([grouped.shape[-1] - 2 * head_dim, head_dim, head_dim], dim=-1)
        if reads_views:
            query = self.q_layernorm(query.unflatten(-1, (-1, head_dim))).flatten(2, 3)
        else:
            query = recomputable(functools.partial(_heads, head_dim=head_dim), query)
            query = query if self.q_layernorm is None else self.q_layernorm(query)
        key = key if self.k_layernorm is None else self.k_layernorm(key)
        return query, key, value

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        """[T, 1, A D], from attention's outputs in this shape and the gate [T, 1, A, D]."""
        return recomputable(_gated, x, gate)


def _gated(x: Tensor, gate: Tensor) -> Tensor:
    """Rounded as transformers does."""
    return x * gate.reshape(x.shape).sigmoid()


def _heads(query: Tensor, head_dim: int) -> Tensor:
    """[T, 1, A, D], from [T, 1, K, A / K D]: a copy, unless groups or heads of one are one."""
    return query.reshape(*query.shape[:2], -1, head_dim)
