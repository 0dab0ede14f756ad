"""Attention sinks (arXiv:2309.17453, GPT-OSS): a learned number for each head, which joins the softmax's denominator.

A kernel that gives the logarithm of its denominator need not know of them: with s a head's sink and L that logarithm,
outputs shrink by exp(L) / (exp(L) + exp(s)) = sigmoid(L - s), and the new one's logarithm is log(exp(L) + exp(s)). The
gradients of queries, keys and values are those of a softmax with the new output and the new L; the sink is a key whose
value is zero.

Axes: A query heads; a stream's tensors are [T, A, D], a batch's [B, A, L, D], and sinks broadcast to the axes before D.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_sinks(output: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp with sinks, in the dtype of `lse`; differentiable where the kernel's `lse` is."""
    sinks = sinks.to(lse.dtype)
    return output * torch.sigmoid(lse - sinks)[..., None], torch.logaddexp(lse, sinks)


def sink_gradient(d_output: Tensor, output: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Of each query and head what it gives its sink, in the shape of `lse`, which like `output` is the one with sinks."""
    return -torch.exp(sinks.to(lse.dtype) - lse) * (d_output.to(lse.dtype) * output.to(lse.dtype)).sum(-1)
