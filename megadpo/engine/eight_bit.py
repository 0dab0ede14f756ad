"""AdamW with moments in 8 bits, by bitsandbytes (arXiv:2110.02861): what a checkpoint has of it, and back.

A block of 256 moments has a scale; each moment is one of 256 values between -1 and 1 times it. A checkpoint has the moments
in fp32 and, elementwise, their blocks' scales: where the blocks are the same as they were, the codes are found again, and a
resumed run has the same bits. Where a layout makes other blocks, moments are rounded once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
MOMENTS = {"exp_avg": ("state1", "qmap1", "absmax1"), "exp_avg_sq": ("state2", "qmap2", "absmax2")}
"""Name in checkpoints -> those in bitsandbytes' state."""
SCALE = "_scale"


def adamw(groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> Any:
    """bitsandbytes' AdamW of flat float32 tensors; those of fewer than 4,096 elements keep fp32 moments."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, betas=betas, eps=eps)


def decoded(state: Mapping[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    """Moments, and under their names with `SCALE` the scale of each element's block; float32, of the parameter's shape.

    The scale is 0 where moments are in fp32, and before the first step.
    """
    found: dict[str, Tensor] = {}
    for kind, (codes_name, map_name, scale_name) in MOMENTS.items():
        zeros = torch.zeros_like(parameter, dtype=torch.float32)
        codes = state.get(codes_name)
        if codes is None or codes.dtype is not torch.uint8:
            found |= {kind: zeros if codes is None else codes, kind + SCALE: zeros}
            continue
        scales = state[scale_name].repeat_interleave(BLOCK)[: parameter.numel()]
        found |= {kind: state[map_name][codes.long()] * scales, kind + SCALE: scales}
    return found


def encode(optimizer: Any, parameter: Tensor, moments: Mapping[str, Tensor], num_steps: int) -> None:
    """Set a parameter's state to what `decoded` gave."""
    places = {
        each: (number, place)
        for number, group in enumerate(optimizer.param_groups)
        for place, each in enumerate(group["params"])
    }
    number, place = places[parameter]
    if not optimizer.initialized:
        optimizer.check_overrides()
        optimizer.to_gpu()
        optimizer.initialized = True
    optimizer.init_state(optimizer.param_groups[number], parameter, number, place)
    state = optimizer.state[parameter]
    state["step"] = num_steps
    for kind, (codes_name, map_name, scale_name) in MOMENTS.items():
        values = moments[kind].to(parameter.device)
        if state[codes_name].dtype is not torch.uint8:
            state[codes_name].copy_(values)
            continue
        scales = _block_scales(values, moments[kind + SCALE].to(parameter.device))
        state[scale_name].copy_(scales)
        state[codes_name].copy_(_codes(values, scales, state[map_name]))


def _block_scales(values: Tensor, given: Tensor) -> Tensor:
    """The scale of each block: the given one where the block has one, else its largest value."""
    padding = -len(values) % BLOCK
    blocks = torch.nn.functional.pad(values.abs(), (0, padding)).view(-1, BLOCK)
    highest = torch.nn.functional.pad(given, (0, padding)).view(-1, BLOCK)
    lowest = torch.nn.functional.pad(given, (0, padding), value=torch.inf).view(-1, BLOCK)
    smallest, largest = lowest.amin(dim=1), highest.amax(dim=1)
    return torch.where((smallest == largest) & (largest > 0), largest, blocks.amax(dim=1))


def _codes(values: Tensor, scales: Tensor, map_: Tensor) -> Tensor:
    """The nearest codes, uint8."""
    shares = values / scales.repeat_interleave(BLOCK)[: len(values)].clamp(min=torch.finfo(torch.float32).tiny)
    ordered, order = map_.sort()
    return order[torch.bucketize(shares, (ordered[1:] + ordered[:-1]) / 2)].to(torch.uint8)
