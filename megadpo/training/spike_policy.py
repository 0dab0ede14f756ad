"""What becomes of a step with a spike: `train.on_spike`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megadpo.errors import UserError
from megadpo.metrics.spikes import MOST_IN_A_ROW
from megadpo.training import non_finite
from megadpo.training.console import log
from megadpo.training.spike_record import record_spike

if TYPE_CHECKING:
    from megadpo.training.run import Run
    from megadpo.training.step import StepResult


def accept_or_leave_out(run: Run, step: int, loss: float, result: StepResult) -> bool:
    """Whether step `step`, counted from 1, is to update the model. Every rank has the same loss and norm, and decides alike;
    collective where one of them is not finite.

    Raises:
        UserError: `train.on_spike` is stop, or a step that is not finite cannot be left out.
    """
    policy, what = run.setup.config.train.on_spike, run.spikes.spike(loss, result.grad_norm)
    if what is None or (policy == "warn" and math.isfinite(loss) and math.isfinite(result.grad_norm)):
        if what is not None:
            log(f"warning: step {step}: {what}; it was trained on, since train.on_spike is warn")
            record_spike(run, step, what, loss, result, updated=True)
        run.spikes.count(updated=True)
        return True
    if not math.isfinite(loss) or not math.isfinite(result.grad_norm):
        what += non_finite.cause(run.engine, run.groups, result)
    run.spikes.count(updated=False)
    record_spike(run, step, what, loss, result, updated=False)
    if policy == "skip" and run.spikes.num_in_a_row < MOST_IN_A_ROW:
        log(f"warning: step {step}: {what}; nothing was updated, since train.on_spike is skip")
        return False
    if policy == "skip":
        what += f", the last of {MOST_IN_A_ROW} steps in a row that train.on_spike left out"
    raise UserError(
        f"step {step}: {what}, so nothing was updated; lower train.learning_rate, or look for broken weights or rows"
        + ("" if policy == "skip" else " (train.on_spike: skip leaves such steps out)")
    )
