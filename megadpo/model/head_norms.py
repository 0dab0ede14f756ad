"""Norms of queries and keys whose weights are cut over the tensor ranks as the heads are.

Axes: T stream tokens, A heads of queries or keys of this tensor rank, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from megadpo.model.norm import LayerNorm, RMSNorm


class HeadsNorm(LayerNorm):
    """Of queries or keys [T, 1, A, D]: LayerNorm of each head, with a weight of its own: this rank's part [A, D]."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, num_heads: int = 1, **options: Any) -> None:
        """`num_heads`: of all tensor ranks."""
        super().__init__(config, hidden_size, eps, **options)
        share = num_heads // config.tensor_model_parallel_size
        _hold_part(self, self.weight.new_empty(share, hidden_size))

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """[T, 1, A, D], from x [T, 1, A, D] and the norm's weight [A, D]."""
        normed = F.layer_norm(x.float(), x.shape[-1:], None, None, self.eps or 0.0)
        return (normed * self.applied(weight).float()).to(x.dtype)


class ProjectionNorm(RMSNorm):
    """Of queries or keys [T, 1, A, D]: RMSNorm over the columns of all heads, those of the other tensor ranks, too.

    The weight is this rank's part [A D].
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, num_heads: int = 1, **options: Any) -> None:
        """`num_heads`: of all tensor ranks, each of `hidden_size` columns."""
        super().__init__(config, hidden_size, eps, **options)
        self.num_columns = num_heads * hidden_size
        _hold_part(self, self.weight.new_empty(self.num_columns // config.tensor_model_parallel_size))

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """[T, 1, A, D], from x [T, 1, A, D] and the norm's weight [A D]."""
        group = parallel_state.get_tensor_model_parallel_group()
        return _NormOverRanks.apply(x.flatten(2), self.applied(weight), self.eps, self.num_columns, group).view(x.shape)


def _hold_part(norm: RMSNorm, weight: Tensor) -> None:
    """Give a norm its weight. Each tensor rank has its own part and sees every token, so that nothing is summed."""
    norm.weight = torch.nn.Parameter(weight)


class _NormOverRanks(torch.autograd.Function):
    """x [..., this rank's columns] / rms(x over the columns of all ranks) * weight, in float32, rounded once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, num_columns: int, group: dist.ProcessGroup) -> Tensor:
        wide = x.float()
        squares = wide.pow(2).sum(-1, keepdim=True)
        _sum_over(squares, group)
        scale = torch.rsqrt(squares / num_columns + eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.num_columns, ctx.group = num_columns, group
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        """As of `_RMSNorm`, the mean of g n being over the columns of all ranks."""
        x, weight, scale = ctx.saved_tensors
        gradient, normed = gradients[0].float(), x.float() * scale
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = (gradient * normed).flatten(0, -2).sum(0).to(weight.dtype)
        gradient = gradient * weight
        products = (gradient * normed).sum(-1, keepdim=True)
        _sum_over(products, ctx.group)
        x_gradient = torch.addcmul(gradient, normed, products, value=-1 / ctx.num_columns).mul_(scale)
        return x_gradient.to(x.dtype), weight_gradient, None, None, None


def _sum_over(numbers: Tensor, group: dist.ProcessGroup) -> None:
    if dist.get_world_size(group) > 1:
        dist.all_reduce(numbers, group=group)
