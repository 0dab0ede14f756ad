"""Keys and values of shared prompts, which the layers of a stage keep from the first half of a micro-batch for the second.

The second half reads detached copies, so that each half is a graph of its own. Its backward runs first and leaves gradients
with the copies; the first half's backward adds them to those of its own keys and values where they were copied. Where a
layer is computed again for its backward, the copies are still those of its first forward, which are the same bits.

Axes: T stream tokens, Q tokens of the prompts, K key-value heads, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megadpo.data.batches.halves import PairHalf


class PromptKeys:
    """Of one micro-batch."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, ...]] = {}

    def passed(self, layer: int, half: PairHalf, *keys_and_values: Tensor) -> tuple[Tensor, ...]:
        """What a layer attends to, given its keys and its values [T, K, D] of a half; of the second half [Q + T, K, D]."""
        if not len(half.prompts_Q):
            return keys_and_values
        if not half.is_first:
            return tuple(torch.cat(pair) for pair in zip(self._kept[layer], keys_and_values, strict=True))
        if layer not in self._kept:
            copies = (own.detach().index_select(0, half.prompts_Q) for own in keys_and_values)
            self._kept[layer] = tuple(copy.requires_grad_() for copy in copies)
        if not torch.is_grad_enabled():
            return keys_and_values
        pairs = zip(keys_and_values, self._kept[layer], strict=True)
        return tuple(_WithGradientOf.apply(own, copy, half.prompts_Q) for own, copy in pairs)


class _WithGradientOf(torch.autograd.Function):
    """`own` [T, K, D]; its gradient gets that of its copied rows, which is there by then."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, copy: Tensor, rows_Q: Tensor) -> Tensor:
        # As an attribute and not as a saved tensor: what is read of it, its gradient, is yet to come.
        ctx.copy, ctx.rows_Q = copy, rows_Q
        return own.view_as(own)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        if ctx.copy.grad is not None:
            gradient = gradient.index_add(0, ctx.rows_Q, ctx.copy.grad)
        return gradient, None, None
