"""silu(gate) * up by two Triton kernels, forward and backward, from Megatron's packed projection [..., gate and up].

Axes: R rows, F columns of the gate, and as many of up behind them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megadpo.model.recompute import recomputable
from megadpo.model.swiglu import SwiGLU

BLOCK_COLUMNS = 1024


class TritonSwiGLU(SwiGLU):
    """The activation of Megatron's spec by these kernels."""

    def forward(self, x: Tensor) -> Tensor:
        return recomputable(swiglu, x)


def swiglu(x: Tensor) -> Tensor:
    """[..., 2 F], gate first -> contiguous [..., F]; in float32, rounded once to x's dtype."""
    return _SwiGLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    """Keeps its input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        packed, output = x.contiguous(), x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        if output.numel():
            _forward[_grid(output)](packed, output, output.shape[-1], BLOCK_COLUMNS)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        packed, gradient = x.contiguous(), gradients[0].contiguous()
        x_gradient = torch.empty_like(packed)
        if gradient.numel():
            _backward[_grid(gradient)](packed, gradient, x_gradient, gradient.shape[-1], BLOCK_COLUMNS)
        return x_gradient


def _grid(output: Tensor) -> tuple[int, int]:
    num_columns = output.shape[-1]
    return output.numel() // num_columns, triton.cdiv(num_columns, BLOCK_COLUMNS)


@triton.jit
def _forward(packed, output, num_columns, BLOCK_COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    here = columns < num_columns
    gates = packed + row * 2 * num_columns + columns
    gate = tl.load(gates, mask=here, other=0.0).to(tl.float32)
    up = tl.load(gates + num_columns, mask=here, other=0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    tl.store(output + row * num_columns + columns, product.to(output.dtype.element_ty), mask=here)


@triton.jit
def _backward(packed, gradients, x_gradient, num_columns, BLOCK_COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    here = columns < num_columns
    at = row * 2 * num_columns + columns
    gate = tl.load(packed + at, mask=here, other=0.0).to(tl.float32)
    up = tl.load(packed + at + num_columns, mask=here, other=0.0).to(tl.float32)
    gradient = tl.load(gradients + row * num_columns + columns, mask=here, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    gate_gradient = gradient * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(x_gradient + at, gate_gradient.to(x_gradient.dtype.element_ty), mask=here)
    up_gradient = gradient * gate * sigmoid
    tl.store(x_gradient + at + num_columns, up_gradient.to(x_gradient.dtype.element_ty), mask=here)
