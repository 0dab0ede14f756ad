"""RMSNorm by two Triton kernels: forward, and backward with the weight's gradient.

A program has rows in blocks. What a row comes to does not depend on how many others there are: policy and reference, whose
streams are the same, agree to the bit.

Axes: R rows, H columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megadpo.model.norm import RMSNorm

MAX_COLUMNS = 16384
"""The widest row that a program holds in registers."""

BLOCK_NUMBERS = 4096
"""How many numbers a program has at once where rows are shorter than that: heads' norms have many short rows."""

MAX_PROGRAMS = 512
"""Programs of the backward, each of which sums its own rows into one of the weight's gradient: some four on each
multiprocessor of a large GPU, and few rows for the sum that comes after. A constant, so that rounding is the same on every
GPU."""


class TritonRMSNorm(RMSNorm):
    """The norm of Megatron's spec by these kernels."""

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.shape[-1] > MAX_COLUMNS:
            return super().normed(x, weight)
        assert self.eps is not None
        return rms_norm(x, weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, in float32 and rounded once to x's dtype: contiguous [..., H], from x [..., H], weight [H]."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps x as it came and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows_RH = x.reshape(-1, x.shape[-1]).contiguous()
        num_rows, num_columns = rows_RH.shape
        normed_RH = torch.empty_like(rows_RH)
        scale_R = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        block = _block(num_columns)
        if num_rows:
            _forward[(triton.cdiv(num_rows, block["BLOCK_ROWS"]),)](
                rows_RH, weight, normed_RH, scale_R, num_rows, num_columns, eps, **block
            )
        ctx.save_for_backward(x, weight, scale_R)
        return normed_RH.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x scale and g = gradient weight: dx = scale (g - n mean(g n)), dweight = sum over rows of gradient n."""
        x, weight, scale_R = ctx.saved_tensors
        rows_RH = x.reshape(-1, x.shape[-1]).contiguous()
        gradient_RH = gradients[0].reshape(rows_RH.shape).contiguous()
        num_rows, num_columns = rows_RH.shape
        x_gradient_RH = torch.empty_like(rows_RH)
        block = _block(num_columns)
        num_programs = min(triton.cdiv(num_rows, block["BLOCK_ROWS"]), MAX_PROGRAMS)
        sums = torch.empty(num_programs, num_columns, dtype=torch.float32, device=x.device)
        if num_rows:
            _backward[(num_programs,)](
                rows_RH, weight, scale_R, gradient_RH, x_gradient_RH, sums, num_rows, num_columns, **block
            )
        return x_gradient_RH.view(x.shape), sums.sum(0).to(weight.dtype), None


def _block(num_columns: int) -> dict[str, int]:
    columns = triton.next_power_of_2(num_columns)
    rows = max(1, BLOCK_NUMBERS // columns)
    return {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns, "num_warps": 16 if columns > BLOCK_NUMBERS else 8}


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x_RH,
    weight_H,
    normed_RH,
    scale_R,
    num_rows,
    num_columns,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    columns = tl.arange(0, BLOCK_COLUMNS)
    here = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    at = rows[:, None] * num_columns + columns[None, :]
    weight = tl.load(weight_H + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    x = tl.load(x_RH + at, mask=here, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / num_columns + eps)
    tl.store(scale_R + rows, scale, mask=rows < num_rows)
    normed = x * scale[:, None] * weight[None, :]
    tl.store(normed_RH + at, normed.to(normed_RH.dtype.element_ty), mask=here)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    x_RH,
    weight_H,
    scale_R,
    gradient_RH,
    x_gradient_RH,
    sums_PH,
    num_rows,
    num_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_COLUMNS)
    weight = tl.load(weight_H + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    weight_gradient = tl.zeros([BLOCK_COLUMNS], dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_ROWS), tl.num_programs(0)):
        rows = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        here = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        at = rows[:, None] * num_columns + columns[None, :]
        scale = tl.load(scale_R + rows, mask=rows < num_rows, other=0.0)
        gradient = tl.load(gradient_RH + at, mask=here, other=0.0).to(tl.float32)
        normed = tl.load(x_RH + at, mask=here, other=0.0).to(tl.float32) * scale[:, None]
        weight_gradient += tl.sum(gradient * normed, axis=0)
        gradient = gradient * weight[None, :]
        mean = tl.sum(gradient * normed, axis=1) / num_columns
        x_gradient = (gradient - normed * mean[:, None]) * scale[:, None]
        tl.store(x_gradient_RH + at, x_gradient.to(x_gradient_RH.dtype.element_ty), mask=here)
    tl.store(sums_PH + tl.program_id(0) * num_columns + columns, weight_gradient, mask=columns < num_columns)
