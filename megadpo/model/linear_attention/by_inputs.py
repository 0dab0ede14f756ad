"""Of what is cheap beside what it would keep, only the inputs are kept for the backward pass, which computes it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def keeping_inputs(operation: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`operation(*inputs)`, of which autograd keeps these alone.

    Args:
        operation: a pure function of floating-point tensors, differentiable by autograd.
    """
    result: Tensor = _KeepingInputs.apply(operation, *inputs)
    return result


class _KeepingInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operation: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.operation = operation
        ctx.save_for_backward(*inputs)
        return operation(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        is_wanted = ctx.needs_input_grad[1:]
        inputs = [saved.detach().requires_grad_(wanted) for saved, wanted in zip(ctx.saved_tensors, is_wanted, strict=True)]
        with torch.enable_grad():
            result = ctx.operation(*inputs)
        wanted_inputs = [each for each in inputs if each.requires_grad]
        found = iter(torch.autograd.grad(result, wanted_inputs, gradients))
        return None, *(next(found) if wanted else None for wanted in is_wanted)
