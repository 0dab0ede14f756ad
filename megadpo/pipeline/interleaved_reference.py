"""A resident reference whose forwards run among the policy's operations, some of them a step ahead (see fill.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.pipeline import fill
from megadpo.pipeline.operations import (
    CombinedOperations,
    ForwardOperations,
    PolicyOperations,
    Within,
    num_halves,
    num_stages,
    run_schedule,
)
from megadpo.pipeline.schedule import REFERENCE, Op, Schedule, all_forwards
from megadpo.pipeline.simulate import Costs


@dataclass
class ReferencePass:
    """The reference's forwards of one step's micro-batches, under way.

    Attributes:
        logps: of each micro-batch on the last stage once its forward is done there, [R] float64; else None.
        operations: what its forwards do on this stage.
        received: what has arrived for operations that this stage has not done.
        done: how far each stage is.
    """

    micro_batches: Sequence[MicroBatch]
    logps: list[Tensor | None]
    operations: ForwardOperations
    received: dict[Op, Tensor] = field(default_factory=dict)
    done: fill.Progress | None = None


class InterleavedReference:
    """Made for a training run and given to its `OwnSchedule`; each step begins it, and may say what the next one has.

    `models` are this stage's chunks of the reference, whose forwards run `within` a context.
    """

    def __init__(self, models: Sequence[Any], ld_alpha: float | None, within: Within = contextlib.nullcontext) -> None:
        self.models, self.ld_alpha, self.within = models, ld_alpha, within
        self._this_step = self._not_begun([])
        self._next_step: ReferencePass | None = None

    def begin(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor | None]:
        """A step begins; the reference log-probs of its micro-batches, which are there when the policy needs them."""
        ahead, self._next_step = self._next_step, None
        group_ids = [micro_batch.group_ids for micro_batch in micro_batches]
        if ahead is not None and group_ids == [micro_batch.group_ids for micro_batch in ahead.micro_batches]:
            self._this_step = ahead
        else:
            self._this_step = self._not_begun(micro_batches)
        return self._this_step.logps

    def complete(self) -> None:
        """Do now what is left of this step's forwards; collective over the pipeline."""
        current = self._this_step
        size = num_stages(), len(current.micro_batches), len(self.models)
        whole = all_forwards(*size, REFERENCE, num_halves(current.micro_batches))
        done = current.done or (0,) * whole.num_stages
        left = tuple(order[start:] for order, start in zip(whole.stages, done, strict=True))
        run_schedule(replace(whole, stages=left), Costs(), current.operations, current.received)
        current.done, current.received = tuple(map(len, whole.stages)), {}

    def run_ahead(self, micro_batches: Sequence[MicroBatch]) -> None:
        """The step after this one has these micro-batches, and the reference does not move before it."""
        self._next_step = self._not_begun(micro_batches)

    def run_among(self, policy: Schedule, costs: Costs, operations: PolicyOperations) -> None:
        """Run the policy's operations, with this step's forwards that are not done, and some of the next step's."""
        current, ahead = self._this_step, self._next_step
        assert len(current.micro_batches) == policy.num_micro_batches, "the step has begun"
        num_ahead = 0 if ahead is None else len(ahead.micro_batches)
        filled, progress = fill.with_reference(policy, current.done, num_ahead, costs)
        combined = CombinedOperations(operations, current.operations, None if ahead is None else ahead.operations)
        unread = run_schedule(filled, costs, combined, current.received)
        current.received = {}
        if ahead is not None:
            ahead.done = progress
            ahead.received = {op._replace(kind=REFERENCE): tensor for op, tensor in unread.items()}

    def _not_begun(self, micro_batches: Sequence[MicroBatch]) -> ReferencePass:
        logps: list[Tensor | None] = [None] * len(micro_batches)

        def keep(number: int, sums_RS: Tensor) -> None:
            logps[number] = sums_RS[:, 0]

        operations = ForwardOperations(self.models, micro_batches, self.ld_alpha, keep, within=self.within)
        return ReferencePass(micro_batches, logps, operations)
