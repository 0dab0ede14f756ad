"""AdamW whose moments are stored in bfloat16, which halves their memory; the arithmetic is float32.

A step moves exp_avg_sq by 1 - beta2 of the difference, at beta2 = 0.999 less than half of bfloat16's last place: rounded to
the nearest it would never fall. So moments are rounded stochastically, with a probability of rounding up proportional to
the remainder: a number below one unit in the last place is added, then the lower bits are cut off. In place of a random
number it is a function of element and step, a low-discrepancy sequence over both
(https://extremelearning.com.au/unreasonable-effectiveness-of-quasirandom-sequences/): the mean over steps comes close to the
value, and a resumed run has the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megadpo.engine.base import MOMENTS
from megadpo.engine.fused_adamw import update

TILE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Elements that are updated at once: their moments are in float32 meanwhile."""

ELEMENT_STRIDE, STEP_STRIDE = 37345, 49471
"""How far the addend advances from element to element, and from step to step, in 2^-16 units in the last place."""


class AdamWWithBf16Moments(torch.optim.AdamW):
    """State of a parameter: `step`, and MOMENTS in bfloat16. Parameters are flat, float32, with float32 gradients."""

    @classmethod
    def with_groups_of(cls, optimizer: torch.optim.Optimizer) -> AdamWWithBf16Moments:
        """One with the parameter groups of another, whose parameters may be views (no leaves) by now."""
        new = cls([torch.empty(0)])
        new.param_groups = optimizer.param_groups
        return new

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state.update({kind: torch.zeros_like(parameter, dtype=torch.bfloat16) for kind in MOMENTS})
        state["step"] += 1
        length = TILE_ELEMENTS[parameter.device.type]
        addend = _addend(min(length, parameter.numel()), state["step"])
        for start in range(0, parameter.numel(), length):
            tile = slice(start, start + length)
            moments = [state[kind][tile].float() for kind in MOMENTS]
            gradient = parameter.grad[tile]  # type: ignore[index]
            update([parameter[tile]], [gradient], [[moment] for moment in moments], state["step"], group)
            for kind, values in zip(MOMENTS, moments, strict=True):
                bits = values.view(torch.int32).add_(addend[: len(values)]).bitwise_and_(-(1 << 16))
                state[kind][tile] = bits.view(torch.float32)


def _addend(length: int, step: Tensor) -> Tensor:
    """[length], int32: what is added to the bits of a tile's values before the lower 16 are cut off, in [0, 2^16)."""
    places = torch.arange(length, device=step.device)
    return places.mul_(ELEMENT_STRIDE).add_(step.long() * STEP_STRIDE).bitwise_and_((1 << 16) - 1).int()
