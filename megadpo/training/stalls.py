"""A run that learns nothing says so, once: its gradient is 0, or its weights do not move.

Weights are looked at in a sample, every so many steps and at the end, as the model computes with them: in bfloat16 an update
may be too small to change any.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megadpo.model.build import Stage
from megadpo.parallel.zero3 import is_partitioned, own_part
from megadpo.platform.device import compute_device

STEPS_BETWEEN_LOOKS = 50
FEWEST_STEPS = 10
"""A shorter stretch says nothing."""

SAMPLES_PER_PARAMETER = 64


class StallWatch:
    """Of one stage; every rank has one, and `look` is collective at the same steps on each."""

    def __init__(self, stage: Stage, first_step: int, last_step: int, log: Callable[[str], None]) -> None:
        """`first_step`: the steps done when the run began or went on; `last_step`: of the whole run."""
        self._stage, self._log, self._last_step = stage, log, last_step
        self._looked_at, self._weights = first_step, _sample(stage)
        self._has_said_zero = self._has_said_still = False

    def look(self, step: int, grad_norm: float, learning_rate: float) -> None:
        """After step `step`, counted from 1."""
        if grad_norm == 0 and not self._has_said_zero:
            self._has_said_zero = True
            self._log(
                f"warning: the gradient norm of step {step} is 0: this step taught the model nothing; look whether chosen "
                "and rejected differ, and whether the loss has any slope left where the model is"
            )
        if self._has_said_still or (step % STEPS_BETWEEN_LOOKS and step != self._last_step):
            return
        earlier, since = self._weights, self._looked_at
        self._weights, self._looked_at = _sample(self._stage), step
        if step - since < FEWEST_STEPS:
            return
        moved = len(earlier) != len(self._weights) or not torch.equal(earlier, self._weights)
        counts = torch.tensor([float(moved), float(len(earlier))], device=compute_device())
        dist.all_reduce(counts)
        any_moved, num_samples = counts.tolist()
        if num_samples and not any_moved:
            self._has_said_still = True
            self._log(
                f"warning: of {num_samples:,.0f} weights looked at, none has changed from step {since} to step {step}, "
                f"whose learning rate was {learning_rate:.3g}: raise train.learning_rate, or look at the gradient norm"
            )


def _sample(stage: Stage) -> Tensor:
    """Some weights of every parameter that is in memory here, spread over it."""
    parts = []
    for parameter, _ in stage.parameters.values():
        if is_partitioned(parameter) and parameter.ds_tensor.status.name != "AVAILABLE":  # type: ignore[attr-defined]
            continue  # in a file
        values = own_part(parameter).detach().reshape(-1)
        stride = max(1, len(values) // SAMPLES_PER_PARAMETER)
        parts.append(values[::stride][:SAMPLES_PER_PARAMETER].float())
    return torch.cat(parts) if parts else torch.empty(0)
