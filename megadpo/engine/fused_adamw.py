"""AdamW's update of some float32 tensors by torch's fused kernel, for optimizers that keep moments in a way of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def update(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    moments: Sequence[Sequence[Tensor]],
    num_steps: Tensor,
    group: dict[str, Any],
) -> None:
    """Update parameters and moments, all float32 and of the same device, in place, by the options of a parameter group.

    Args:
        moments: for each of `engine.base.MOMENTS`, that of each parameter.
        num_steps: this one included; a tensor of the device.
    """
    torch._fused_adamw_(
        list(parameters),
        list(gradients),
        list(moments[0]),
        list(moments[1]),
        [],
        [num_steps] * len(parameters),
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )
