"""Attention of a packed stream in one call of a GPU kernel for sequences of different lengths.

These kernels take queries and keys of all sequences one after the other, and where each begins; with fewer queries than keys
the last query sees all keys. So a segment is a sequence whose keys are those of its prompt and its own: they are gathered
by an index made once a micro-batch, and the gather's backward adds up a prompt's gradients over its responses.

torch's own `varlen_attn`, flash-attn and TransformerEngine's `DotProductAttention` differ in names only.

Axes: T stream tokens, S keys of the stream, G gathered keys, N segments, A query heads, K key-value heads, D head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megadpo.data.batches.micro_batch import Piece, Segment


@dataclass(frozen=True)
class Sequences:
    """A stream's segments as such kernels take them.

    Attributes:
        keys_G: int64, the stream's keys in the order that the kernel reads them; None: as they lie.
        query_starts, key_starts: int32 [N + 1], where each sequence begins, and the end of the last.
        max_queries, max_keys: of a sequence.
    """

    keys_G: Tensor | None
    query_starts: Tensor
    key_starts: Tensor
    max_queries: int
    max_keys: int


Kernel = Callable[[Tensor, Tensor, Tensor, Sequences, int | None, float], Tensor]
"""(query [T, A, D], gathered key and value [G, K, D], sequences, window, scale) -> [T, A, D]."""


def sequences_of(segments: Sequence[Segment | Piece], num_keys: int, device: torch.device) -> Sequences:
    """The sequences of a stream that has `num_keys` keys; segments without tokens are left out."""
    there = [segment for segment in segments if segment.end > segment.start]
    keys = [np.concatenate([np.arange(s.prompt_start, s.prompt_end), np.arange(s.keys.start, s.keys.stop)]) for s in there]
    keys_G = np.concatenate(keys)
    num_queries_N, num_keys_N = [s.end - s.start for s in there], [len(some) for some in keys]

    def starts(lengths: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device)

    return Sequences(
        None if np.array_equal(keys_G, np.arange(num_keys)) else torch.from_numpy(keys_G).to(device),
        starts(num_queries_N),
        starts(num_keys_N),
        max(num_queries_N),
        max(num_keys_N),
    )


def attend_in_one_call(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, window: int | None, scale: float, kernel: Kernel
) -> Tensor:
    """[T, A, D], from query [T, A, D], key and value [S, K, D]."""
    if sequences.keys_G is not None:
        key, value = (x.index_select(0, sequences.keys_G) for x in (key, value))
    return kernel(query, key, value, sequences, window, scale)


def _reach(window: int | None) -> tuple[int, int]:
    """(keys before the query's own, keys after it) that it sees: these kernels leave the query's own key out."""
    return (-1, 0) if window is None else (window - 1, 0)


def torch_kernel(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, window: int | None, scale: float
) -> Tensor:
    """torch.nn.attention.varlen: causal is a window that ends at the query."""
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
        query,
        key,
        value,
        sequences.query_starts,
        sequences.key_starts,
        sequences.max_queries,
        sequences.max_keys,
        scale=scale,
        window_size=_reach(window),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output


def flash_attn_kernel(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, window: int | None, scale: float
) -> Tensor:
    """flash-attn 2.1 and later; before, causal meant the upper left corner."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=sequences.query_starts,
        cu_seqlens_k=sequences.key_starts,
        max_seqlen_q=sequences.max_queries,
        max_seqlen_k=sequences.max_keys,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=True,
        window_size=_reach(window),
    )


def transformer_engine_kernel(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, window: int | None, scale: float
) -> Tensor:
    """TransformerEngine, which chooses among its own kernels, cuDNN's and flash-attn."""
    module = _transformer_engine_module(query.shape[1], key.shape[1], query.shape[2], scale)
    output = module(
        query,
        key,
        value,
        qkv_format="thd",
        cu_seqlens_q=sequences.query_starts,
        cu_seqlens_kv=sequences.key_starts,
        max_seqlen_q=sequences.max_queries,
        max_seqlen_kv=sequences.max_keys,
        attn_mask_type="padding_causal_bottom_right",
        window_size=_reach(window),
    )
    return output.view(query.shape)


@functools.cache
def _transformer_engine_module(num_heads: int, num_key_value_heads: int, head_dim: int, scale: float) -> Any:
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
