"""act(gate) * up that keeps only its input for the backward pass; fills the MLP's activation_func slot.

Autograd would also keep act(gate), and put the gradient together from padded halves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megadpo.model.recompute import recomputable


class SwiGLU(torch.nn.Module):
    """[..., 2 F], gate first -> [..., F], with SiLU."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return recomputable(_SwiGLU.apply, x)


class TanhGeGLU(SwiGLU):
    """With GELU by its approximation with tanh."""

    def forward(self, x: Tensor) -> Tensor:
        return recomputable(_TanhGeGLU.apply, x)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        (gradient,) = gradients
        gate, up = x.chunk(2, dim=-1)
        x_gradient = torch.empty_like(x)
        gate_gradient, up_gradient = x_gradient.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=gate_gradient)
        torch.mul(gradient, F.silu(gate), out=up_gradient)
        return x_gradient


class _TanhGeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh").mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        (gradient,) = gradients
        gate, up = x.chunk(2, dim=-1)
        x_gradient = torch.empty_like(x)
        gate_gradient, up_gradient = x_gradient.chunk(2, dim=-1)
        torch.ops.aten.gelu_backward.grad_input(gradient * up, gate, approximate="tanh", grad_input=gate_gradient)
        torch.mul(gradient, F.gelu(gate, approximate="tanh"), out=up_gradient)
        return x_gradient
