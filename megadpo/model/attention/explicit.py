"""Attention with its scores in memory, for a tile of queries at a time: what fused kernels cannot do with scores before
their softmax (a softcap), and sinks where no kernel gives what they need.

Its two operations take and give what torch's CPU flash kernel takes and gives, so that blocks of one stream can be merged
and go back one by one (cpu_flash.py). They compute in float32, or in float64 where the operands have it.

Axes: B batch, A heads, N queries and M keys of a call, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megadpo.model.attention.sinks import sink_gradient, with_sinks

MAX_SCORES = 1 << 24
"""Scores of a tile, all heads together."""


def explicit_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, A, N, D of the values] in float32 or wider, and the logarithm of the softmax's denominator [B, A, N].

    Args:
        query: [B, A, N, D].
        key, value: [B, A, M, D], whose D may differ.
        dropout: 0.
        is_causal: N is M, and a query sees no later key.
        attn_mask: broadcast to [B, A, N, M]: added to scores, or boolean and False where a query does not look.
        scale: what scores are multiplied by.
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2, arXiv:2408.00118).
    """
    assert dropout == 0.0
    query, key, value = _wide(query), _wide(key), _wide(value)
    output = query.new_empty(*query.shape[:3], value.shape[3])
    lse_BAN = query.new_empty(query.shape[:3])
    for rows, num_keys in _tiles(query, key, is_causal):
        scores = _capped(query[:, :, rows] @ key[:, :, :num_keys].mT, scale, softcap)
        scores = _masked(scores, attn_mask, rows, is_causal)
        lse_BAN[:, :, rows] = lse = scores.logsumexp(-1)
        output[:, :, rows] = scores.sub_(lse[..., None]).exp_() @ value[:, :, :num_keys]
    return output, lse_BAN


def explicit_backward(
    d_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse_BAN: Tensor,
    dropout: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value in float32 or wider.

    `output` and `lse_BAN` are those over all that the queries see, which may be more than these keys; a query whose
    `lse_BAN` is infinite gives nothing.
    """
    assert dropout == 0.0
    query, key, value, d_output = _wide(query), _wide(key), _wide(value), _wide(d_output)
    d_query, d_key, d_value = torch.empty_like(query), key.new_zeros(key.shape), value.new_zeros(value.shape)
    inner_BAN = (d_output * output).sum(-1)
    for rows, num_keys in _tiles(query, key, is_causal):
        d_out, queries = d_output[:, :, rows], query[:, :, rows]
        keys, values = key[:, :, :num_keys], value[:, :, :num_keys]
        scores = _capped(queries @ keys.mT, scale, softcap)
        # d (c tanh(s / c)) / ds is 1 - tanh(s / c)^2.
        slope = None if softcap is None else 1 - (scores / softcap).square_()
        weights = _masked(scores, attn_mask, rows, is_causal).sub_(lse_BAN[:, :, rows, None]).exp_()
        d_value[:, :, :num_keys] += weights.mT @ d_out
        d_scores = (d_out @ values.mT).sub_(inner_BAN[:, :, rows, None]).mul_(weights).mul_(scale)
        d_scores = d_scores if slope is None else d_scores.mul_(slope)
        d_query[:, :, rows] = d_scores @ keys
        d_key[:, :, :num_keys] += d_scores.mT @ queries
    return d_query, d_key, d_value


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks_A: Tensor | None,
) -> Tensor:
    """Output [B, A, N, D of the values] in the dtype of `query`, differentiable; keeps no scores.

    Args:
        query: [B, A, N, D].
        key, value: [B, K, M, D], where K divides A.
        mask: as `attn_mask` of `explicit_forward`; None: a causal square.
        sinks_A: see sinks.py.
    """
    num_sharing = query.shape[1] // key.shape[1]
    if num_sharing > 1:
        key, value = (x.repeat_interleave(num_sharing, dim=1) for x in (key, value))
    return _ExplicitAttention.apply(query, key, value, mask, scale, softcap, sinks_A)


class _ExplicitAttention(torch.autograd.Function):
    """Keeps what a flash kernel keeps: q, k, v, output and log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float | None,
        sinks_A: Tensor | None,
    ) -> Tensor:
        ctx.options = {"attn_mask": mask, "scale": scale, "softcap": softcap}
        output, lse_BAN = explicit_forward(query, key, value, 0.0, mask is None, **ctx.options)
        if sinks_A is not None:
            output, lse_BAN = with_sinks(output, lse_BAN, sinks_A[:, None])
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse_BAN, sinks_A)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse_BAN, sinks_A = ctx.saved_tensors
        is_causal = ctx.options["attn_mask"] is None
        gradients = explicit_backward(d_output, query, key, value, output, lse_BAN, 0.0, is_causal, **ctx.options)
        d_sinks = None
        if sinks_A is not None:
            d_sinks = sink_gradient(d_output, output, lse_BAN, sinks_A[:, None]).sum((0, 2)).to(sinks_A.dtype)
        return *(gradient.to(query.dtype) for gradient in gradients), None, None, None, d_sinks


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def _tiles(query: Tensor, key: Tensor, is_causal: bool) -> Iterator[tuple[slice, int]]:
    """Runs of queries, and how many keys they look at."""
    (num_batch, num_heads, num_queries), num_keys = query.shape[:3], key.shape[2]
    step = max(1, MAX_SCORES // max(1, num_batch * num_heads * num_keys))
    for first in range(0, num_queries, step):
        end = min(first + step, num_queries)
        yield slice(first, end), end if is_causal else num_keys


def _capped(products: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Scores of products of queries and keys, in the products' memory."""
    if softcap is None:
        return products.mul_(scale)
    return products.mul_(scale / softcap).tanh_().mul_(softcap)


def _masked(scores: Tensor, mask: Tensor | None, rows: slice, is_causal: bool) -> Tensor:
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(rows.start + 1)
        return scores.masked_fill_(later, -torch.inf)
    if mask is None:
        return scores
    mask = mask[..., rows, :]
    return scores.masked_fill_(~mask, -torch.inf) if mask.dtype is torch.bool else scores.add_(mask)
