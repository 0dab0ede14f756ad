"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): queries, keys and values are made of narrow, normed latents.

A head's query and key have columns that rope does not turn and, behind them, columns that it does; those of keys are one
vector for all heads, which comes with the latent. The whole keys and values are made and attended to, as in training by
others: a latent in their place pays where one token is computed at a time.

On Megatron's `Attention`, and under the names of its `MLASelfAttention`, which would not do: it knows its own rope only, by
places in the stream and not by position ids; it refuses other linear layers than Megatron's; and under tensor parallelism
each rank would keep its own heads' part of the gradient of the keys' turned columns.

Axes: T stream tokens, t of this rank's part under sequence parallelism, A heads of this tensor rank, D columns of a query
and key head, R of them turned, V of a value head.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    all_to_all_hp2sp,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from megadpo.model.attention.core import StreamParams
from megadpo.model.recompute import recomputable
from megadpo.model.shape import Latents


class LatentAttention(Attention):
    """Fills a layer's self_attention slot. Its matrices are cut over the tensor ranks, those that give latents, too."""

    def __init__(
        self,
        config: Any,
        submodules: MLASelfAttentionSubmodules,
        layer_number: int,
        latents: Latents,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config, submodules, layer_number, attn_mask_type, "self", cp_comm_type, pg_collection)
        self.latents = latents
        column = functools.partial(
            build_module,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )
        norm = functools.partial(build_module, config=config, eps=latents.norm_epsilon)
        hidden, heads, of_keys = config.hidden_size, config.num_attention_heads, latents.key_value_rank
        if latents.query_rank is None:
            self.linear_q_proj = column(submodules.linear_q_proj, hidden, heads * latents.head_dim)
        else:
            self.linear_q_down_proj = column(submodules.linear_q_down_proj, hidden, latents.query_rank)
            self.q_layernorm = norm(submodules.q_layernorm, hidden_size=latents.query_rank)
            self.linear_q_up_proj = column(submodules.linear_q_up_proj, latents.query_rank, heads * latents.head_dim)
        self.linear_kv_down_proj = column(submodules.linear_kv_down_proj, hidden, of_keys + latents.rope_dim)
        self.kv_layernorm = norm(submodules.kv_layernorm, hidden_size=of_keys)
        of_head = latents.plain_dim + latents.value_dim
        self.linear_kv_up_proj = column(submodules.linear_kv_up_proj, of_keys, heads * of_head)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: StreamParams | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[t, 1, hidden] and no bias, from hidden [t, 1, hidden]."""
        assert packed_seq_params is not None
        tensors = self.get_query_key_value_tensors(hidden_states, packed_seq_params)
        if self.checkpoint_core_attention and self.training:
            output = self._checkpointed_attention_forward(*tensors, attention_mask, packed_seq_params=packed_seq_params)
        else:
            output = self.core_attention(*tensors, attention_mask, packed_seq_params=packed_seq_params)
        result: tuple[Tensor, Tensor | None] = self.linear_proj(output)
        return result

    def get_query_key_value_tensors(self, hidden: Tensor, stream: StreamParams) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key [T, 1, A, D], turned, and value [T, 1, A, V], from hidden [t, 1, hidden]."""
        sizes = self.latents
        if sizes.query_rank is None:
            query, _ = self.linear_q_proj(hidden)
        else:
            query, _ = self.linear_q_up_proj(self.q_layernorm(self._latent(self.linear_q_down_proj, hidden)))
        latent, rope_key = self._latent(self.linear_kv_down_proj, hidden).split([sizes.key_value_rank, sizes.rope_dim], -1)
        keys_and_values, _ = self.linear_kv_up_proj(self.kv_layernorm(latent))
        plain_key, value = keys_and_values.unflatten(-1, (-1, sizes.plain_dim + sizes.value_dim)).split(
            [sizes.plain_dim, sizes.value_dim], -1
        )
        assert stream.rotate is not None
        query_TAD, rope_key_T1R = stream.rotate(
            query.unflatten(-1, (-1, sizes.head_dim)).squeeze(1), self._of_all_tokens(rope_key), self.layer_number - 1
        )
        key = recomputable(_whole_keys, plain_key, rope_key_T1R)
        return query_TAD.unsqueeze(1), key, value

    def _latent(self, linear: Any, hidden: Tensor) -> Tensor:
        """All columns of what a layer that is cut over the tensor ranks gives, [t, 1, columns]."""
        cut, _ = linear(hidden)
        if self.world_size == 1:
            return cut
        if self.config.sequence_parallel:
            return all_to_all_hp2sp(cut, group=self.tp_group).unsqueeze(1)
        return gather_from_tensor_model_parallel_region(cut, group=self.tp_group)

    def _of_all_tokens(self, rope_key: Tensor) -> Tensor:
        """[T, 1, R], from [t, 1, R]; the gradient is summed over the tensor ranks, each of which gives its heads' part."""
        if self.world_size == 1:
            return rope_key
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(rope_key, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(rope_key, group=self.tp_group)


def _whole_keys(plain_key_T1AP: Tensor, rope_key_T1R: Tensor) -> Tensor:
    """[T, 1, A, D]: each head's own columns, then those that all have."""
    rope_key = rope_key_T1R.unsqueeze(2).expand(-1, -1, plain_key_T1AP.shape[2], -1)
    return torch.cat([plain_key_T1AP, rope_key], dim=-1)
