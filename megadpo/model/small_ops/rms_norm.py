"""RMSNorm by two Triton kernels: forward, and backward with the weight's gradient.

A program has rows in blocks, which may lie anywhere in a packed projection. What a row comes to does not depend on how many
others there are: policy and reference, whose streams are the same, agree to the bit.

Axes: R rows, H columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_COLUMNS = 16384
"""The widest row that a program holds in registers."""

BLOCK_NUMBERS = 4096
"""How many numbers a program has at once where rows are shorter than that: heads' norms have many short rows."""

MAX_PROGRAMS = 512
"""Programs of the backward, each of which sums its own rows into one of the weight's gradient: some four on each
multiprocessor of a large GPU, and few rows for the sum that comes after. A constant, so that rounding is the same on every
GPU."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, in float32 and rounded once to x's dtype: contiguous [..., H], from x [..., H], weight [H]."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps x as it came and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, *places = _places_of_rows(x)
        num_columns = x.shape[-1]
        num_rows = x.numel() // num_columns
        normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        scale_R = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        block = block_of(num_columns)
        if num_rows:
            _forward[(triton.cdiv(num_rows, block["BLOCK_ROWS"]),)](
                x, weight, normed, scale_R, num_rows, num_columns, eps, *places, **block
            )
        ctx.save_for_backward(x, weight, scale_R)
        return normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x scale and g = gradient weight: dx = scale (g - n mean(g n)), dweight = sum over rows of gradient n."""
        x, weight, scale_R = ctx.saved_tensors
        x, *places = _places_of_rows(x)
        gradient = gradients[0].contiguous()
        num_columns = x.shape[-1]
        num_rows = x.numel() // num_columns
        x_gradient = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        block = block_of(num_columns)
        num_programs = min(triton.cdiv(num_rows, block["BLOCK_ROWS"]), MAX_PROGRAMS)
        sums = torch.empty(num_programs, num_columns, dtype=torch.float32, device=x.device)
        if num_rows:
            _backward[(num_programs,)](
                x, weight, scale_R, gradient, x_gradient, sums, num_rows, num_columns, *places, **block
            )
        return x_gradient, sums.sum(0).to(weight.dtype), None


def _places_of_rows(x: Tensor) -> tuple[Tensor, int, int, int, int, int]:
    """x or a copy of it, and where its rows are: row (outer, middle, inner) lies at the sum of these times their
    strides. What is said is how many there are of the middle and of the inner, and the strides."""
    places: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if places and places[-1][1] == size * stride:
            places[-1] = (places[-1][0] * size, stride)
        else:
            places.append((size, stride))
    if x.stride(-1) != 1 or len(places) > 3:
        return _places_of_rows(x.contiguous())
    (_, outer_stride), (num_middle, middle_stride), (num_inner, inner_stride) = [(1, 0)] * (3 - len(places)) + places
    return x, num_middle, num_inner, outer_stride, middle_stride, inner_stride


def block_of(num_columns: int) -> dict[str, int]:
    """Rows and columns of a program, and its warps."""
    columns = triton.next_power_of_2(num_columns)
    rows = max(1, BLOCK_NUMBERS // columns)
    return {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns, "num_warps": 16 if columns > BLOCK_NUMBERS else 8}


@triton.jit
def _places(  # type: ignore[no-untyped-def]
    rows, num_middle, num_inner, outer_stride, middle_stride, inner_stride
):
    outer, rest = rows // (num_middle * num_inner), rows % (num_middle * num_inner)
    middle, inner = rest // num_inner, rest % num_inner
    return outer.to(tl.int64) * outer_stride + middle.to(tl.int64) * middle_stride + inner.to(tl.int64) * inner_stride


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x,
    weight_H,
    normed_RH,
    scale_R,
    num_rows,
    num_columns,
    eps,
    num_middle,
    num_inner,
    outer_stride,
    middle_stride,
    inner_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    here = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    from_x = _places(rows, num_middle, num_inner, outer_stride, middle_stride, inner_stride)[:, None] + columns[None, :]
    at = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    weight = tl.load(weight_H + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    numbers = tl.load(x + from_x, mask=here, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(numbers * numbers, axis=1) / num_columns + eps)
    tl.store(scale_R + rows, scale, mask=rows < num_rows)
    normed = numbers * scale[:, None] * weight[None, :]
    tl.store(normed_RH + at, normed.to(normed_RH.dtype.element_ty), mask=here)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    x,
    weight_H,
    scale_R,
    gradient_RH,
    x_gradient_RH,
    sums_PH,
    num_rows,
    num_columns,
    num_middle,
    num_inner,
    outer_stride,
    middle_stride,
    inner_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_COLUMNS)
    weight = tl.load(weight_H + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    weight_gradient = tl.zeros([BLOCK_COLUMNS], dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_ROWS), tl.num_programs(0)):
        rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        here = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        from_x = _places(rows, num_middle, num_inner, outer_stride, middle_stride, inner_stride)[:, None] + columns[None, :]
        at = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
        scale = tl.load(scale_R + rows, mask=rows < num_rows, other=0.0)
        gradient = tl.load(gradient_RH + at, mask=here, other=0.0).to(tl.float32)
        normed = tl.load(x + from_x, mask=here, other=0.0).to(tl.float32) * scale[:, None]
        weight_gradient += tl.sum(gradient * normed, axis=0)
        gradient = gradient * weight[None, :]
        mean = tl.sum(gradient * normed, axis=1) / num_columns
        x_gradient = (gradient - normed * mean[:, None]) * scale[:, None]
        tl.store(x_gradient_RH + at, x_gradient.to(x_gradient_RH.dtype.element_ty), mask=here)
    tl.store(sums_PH + tl.program_id(0) * num_columns + columns, weight_gradient, mask=columns < num_columns)
