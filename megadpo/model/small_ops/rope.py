"""Rotary embedding of queries and keys by one Triton kernel, which also is its own backward, by the angles' negatives.

Megatron applies what its rotary slot returns, to queries and to keys, each by some elementwise operations with cosine and
sine rounded to the tensor's dtype. Here that slot returns nothing, and attention rotates (`StreamParams.rotate`).

Axes: T stream tokens, A query heads and K key-value heads of this tensor rank, D head dimension, N = D / 2 pairs of columns.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megadpo.model.attention.core import StreamParams
from megadpo.model.recompute import remember
from megadpo.model.rope import PositionRope

BLOCK_NUMBERS = 2048
"""How many numbers of each half of the columns a program has."""


class TritonRope(PositionRope):
    """Leaves it to attention to rotate queries and keys by this kernel."""

    def forward(self, stream: StreamParams, **unused: Any) -> None:  # type: ignore[override]
        angles_TN = self.angles(stream)
        stream.rotate = functools.partial(_rotate_layer, cosine_TN=angles_TN.cos(), sine_TN=angles_TN.sin())


def _rotate_layer(
    query_TAD: Tensor, key_TKD: Tensor, layer: int, cosine_TN: Tensor, sine_TN: Tensor
) -> tuple[Tensor, Tensor]:
    """In every layer alike."""
    return rotate(query_TAD, key_TKD, cosine_TN, sine_TN)


def rotate(query_TAD: Tensor, key_TKD: Tensor, cosine_TN: Tensor, sine_TN: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys with columns n and n + N, of D = 2 N, turned by angle n of their token, in float32 and rounded once.

    Args:
        query_TAD, key_TKD: views of a packed projection too; only a head's columns must lie side by side, else they are
            copied.
        cosine_TN, sine_TN: contiguous, in float32.
    """
    turned = _Rotate.apply(query_TAD, key_TKD, cosine_TN, sine_TN)
    for result, x in zip(turned, (query_TAD, key_TKD), strict=True):
        remember(result, _turned_alone, x, cosine_TN, sine_TN)
    return turned


class _Rotate(torch.autograd.Function):
    """Keeps cosine and sine, which all layers share."""

    @staticmethod
    def forward(ctx: Any, query_TAD: Tensor, key_TKD: Tensor, cosine_TN: Tensor, sine_TN: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cosine_TN, sine_TN)
        return _turned(query_TAD, key_TKD, cosine_TN, sine_TN, sign=1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query_gradient, key_gradient = gradients
        cosine_TN, sine_TN = ctx.saved_tensors
        return *_turned(query_gradient, key_gradient, cosine_TN, sine_TN, sign=-1.0), None, None


def _turned(query_TAD: Tensor, key_TKD: Tensor, cosine_TN: Tensor, sine_TN: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    query_TAD, key_TKD = (x if x.stride(-1) == 1 else x.contiguous() for x in (query_TAD, key_TKD))
    num_tokens, num_queries, head_dim = query_TAD.shape
    num_heads, num_pairs = num_queries + key_TKD.shape[1], cosine_TN.shape[1]
    assert head_dim == 2 * num_pairs
    turned_query, turned_key = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query_TAD, key_TKD))
    block_pairs = triton.next_power_of_2(num_pairs)
    block_heads = min(triton.next_power_of_2(num_heads), max(1, BLOCK_NUMBERS // block_pairs))
    if num_tokens:
        _turn[(num_tokens, triton.cdiv(num_heads, block_heads))](
            query_TAD,
            key_TKD,
            turned_query,
            turned_key,
            cosine_TN,
            sine_TN,
            sign,
            *query_TAD.stride()[:2],
            *key_TKD.stride()[:2],
            num_queries,
            num_heads,
            num_pairs,
            block_heads,
            block_pairs,
        )
    return turned_query, turned_key


def _turned_alone(x_TAD: Tensor, cosine_TN: Tensor, sine_TN: Tensor) -> Tensor:
    return _turned(x_TAD, x_TAD[:, :0], cosine_TN, sine_TN, sign=1.0)[0]


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    query,
    key,
    turned_query,
    turned_key,
    cosine_TN,
    sine_TN,
    sign,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    num_queries,
    num_heads,
    num_pairs,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """Some heads of one token, queries' counted first; a head is loaded from one of the two tensors, the other is masked."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    is_query, is_key = heads < num_queries, (heads >= num_queries) & (heads < num_heads)
    from_query = query + token * query_token_stride + heads[:, None] * query_head_stride
    from_key = key + token * key_token_stride + (heads - num_queries)[:, None] * key_head_stride
    to_query = turned_query + (token * num_queries + heads[:, None]) * 2 * num_pairs
    to_key = turned_key + (token * (num_heads - num_queries) + (heads - num_queries)[:, None]) * 2 * num_pairs

    pairs = tl.arange(0, BLOCK_PAIRS)
    here = pairs < num_pairs
    cosine = tl.load(cosine_TN + token * num_pairs + pairs, mask=here, other=0.0)[None, :]
    sine = tl.load(sine_TN + token * num_pairs + pairs, mask=here, other=0.0)[None, :] * sign
    of_query, of_key = is_query[:, None] & here[None, :], is_key[:, None] & here[None, :]
    left, right = pairs[None, :], (pairs + num_pairs)[None, :]
    first = tl.load(from_query + left, mask=of_query, other=0.0) + tl.load(from_key + left, mask=of_key, other=0.0)
    second = tl.load(from_query + right, mask=of_query, other=0.0) + tl.load(from_key + right, mask=of_key, other=0.0)
    first, second = first.to(tl.float32), second.to(tl.float32)
    turned = (first * cosine - second * sine).to(turned_query.dtype.element_ty)
    tl.store(to_query + left, turned, mask=of_query)
    tl.store(to_key + left, turned, mask=of_key)
    turned = (second * cosine + first * sine).to(turned_query.dtype.element_ty)
    tl.store(to_query + right, turned, mask=of_query)
    tl.store(to_key + right, turned, mask=of_key)
