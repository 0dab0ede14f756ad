"""Lion (arXiv:2302.06675): steps of one size, in the direction of the sign of an interpolated momentum."""

from __future__ import annotations

from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of the paper, over several tensors at once. State of a parameter: `exp_avg`, of its shape and dtype."""

    def __init__(self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if "exp_avg" not in self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in parameters]
            averages = [self.state[parameter]["exp_avg"] for parameter in parameters]
            (beta1, beta2), rate = group["betas"], group["lr"]
            directions = torch._foreach_mul(averages, beta1)
            torch._foreach_add_(directions, gradients, alpha=1 - beta1)
            torch._foreach_sign_(directions)
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
            torch._foreach_add_(parameters, directions, alpha=-rate)
            torch._foreach_mul_(averages, beta2)
            torch._foreach_add_(averages, gradients, alpha=1 - beta2)
