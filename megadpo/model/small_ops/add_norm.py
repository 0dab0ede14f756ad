"""A residual add and the RMSNorm of its sum by two Triton kernels: forward, and backward with the weight's gradient.

The sum is rounded to its dtype before it is normed, so that both results have the bits of an add and a norm by themselves
(rms_norm.py). Backward, the gradient that reaches the sum beside the norm is added in the same kernel.

Axes: R rows, H columns, P programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megadpo.model.small_ops.rms_norm import MAX_PROGRAMS, block_of


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(residual + x, its norm times `weight`), contiguous [..., H], from x and residual [..., H], weight [H]."""
    return _AddRMSNorm.apply(x, residual, weight, eps)


class _AddRMSNorm(torch.autograd.Function):
    """Keeps the sum, which is a result anyway, and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        x, residual = x.contiguous(), residual.contiguous()
        num_columns = x.shape[-1]
        num_rows = x.numel() // num_columns
        total, normed = torch.empty_like(x), torch.empty_like(x)
        scale_R = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        block = block_of(num_columns)
        if num_rows:
            _forward_add[(triton.cdiv(num_rows, block["BLOCK_ROWS"]),)](
                x, residual, weight, total, normed, scale_R, num_rows, num_columns, eps, **block
            )
        ctx.save_for_backward(total, weight, scale_R)
        return total, normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """The norm's gradient (rms_norm.py) and the sum's own; both terms of the sum get it."""
        of_total, of_normed = gradients
        if of_normed is None:
            return of_total, of_total, None, None
        total, weight, scale_R = ctx.saved_tensors
        of_normed = of_normed.contiguous()
        has_own = of_total is not None
        of_total = of_total.contiguous() if of_total is not None else of_normed
        num_columns = total.shape[-1]
        num_rows = total.numel() // num_columns
        x_gradient = torch.empty_like(total)
        block = block_of(num_columns)
        num_programs = min(triton.cdiv(num_rows, block["BLOCK_ROWS"]), MAX_PROGRAMS)
        sums_PH = torch.empty(num_programs, num_columns, dtype=torch.float32, device=total.device)
        if num_rows:
            _backward_add[(num_programs,)](
                total, weight, scale_R, of_total, of_normed, x_gradient, sums_PH, num_rows, num_columns, has_own, **block
            )
        return x_gradient, x_gradient, sums_PH.sum(0).to(weight.dtype), None


@triton.jit
def _forward_add(  # type: ignore[no-untyped-def]
    x_RH,
    residual_RH,
    weight_H,
    total_RH,
    normed_RH,
    scale_R,
    num_rows,
    num_columns,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    here = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    at = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    weight = tl.load(weight_H + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    added = tl.load(x_RH + at, mask=here, other=0.0).to(tl.float32)
    rounded = (tl.load(residual_RH + at, mask=here, other=0.0).to(tl.float32) + added).to(total_RH.dtype.element_ty)
    tl.store(total_RH + at, rounded, mask=here)
    numbers = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(numbers * numbers, axis=1) / num_columns + eps)
    tl.store(scale_R + rows, scale, mask=rows < num_rows)
    normed = numbers * scale[:, None] * weight[None, :]
    tl.store(normed_RH + at, normed.to(normed_RH.dtype.element_ty), mask=here)


@triton.jit
def _backward_add(  # type: ignore[no-untyped-def]
    total_RH,
    weight_H,
    scale_R,
    of_total_RH,
    of_normed_RH,
    x_gradient_RH,
    sums_PH,
    num_rows,
    num_columns,
    HAS_OWN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_COLUMNS)
    weight = tl.load(weight_H + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    weight_gradient = tl.zeros([BLOCK_COLUMNS], dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_ROWS), tl.num_programs(0)):
        rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        here = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        at = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
        scale = tl.load(scale_R + rows, mask=rows < num_rows, other=0.0)
        gradient = tl.load(of_normed_RH + at, mask=here, other=0.0).to(tl.float32)
        normed = tl.load(total_RH + at, mask=here, other=0.0).to(tl.float32) * scale[:, None]
        weight_gradient += tl.sum(gradient * normed, axis=0)
        gradient = gradient * weight[None, :]
        mean = tl.sum(gradient * normed, axis=1) / num_columns
        x_gradient = (gradient - normed * mean[:, None]) * scale[:, None]
        if HAS_OWN:
            x_gradient += tl.load(of_total_RH + at, mask=here, other=0.0).to(tl.float32)
        tl.store(x_gradient_RH + at, x_gradient.to(x_gradient_RH.dtype.element_ty), mask=here)
    tl.store(sums_PH + tl.program_id(0) * num_columns + columns, weight_gradient, mask=columns < num_columns)
