"""A resident reference whose forwards run among the policy's operations, some of them a step ahead (see fill.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.model.attention.prompt_kv import PromptKeys
from megadpo.pipeline.fill import Progress
from megadpo.pipeline.schedule import Op


@dataclass
class ReferencePass:
    """The reference's forwards of one step's micro-batches, under way.

    Attributes:
        logps: of each micro-batch on the last stage once its forward is done there, [R] float64; else None.
        received: what has arrived for operations that this stage has not done.
        done: how far each stage is.
        prompt_keys, outputs: by micro-batch, what was made of its first half and is needed for its second.
    """

    micro_batches: Sequence[MicroBatch]
    logps: list[Tensor | None]
    received: dict[Op, Tensor] = field(default_factory=dict)
    done: Progress | None = None
    prompt_keys: dict[int, PromptKeys] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, micro_batches: Sequence[MicroBatch]) -> ReferencePass:
        """Not begun."""
        return cls(micro_batches, [None] * len(micro_batches))


class ReferenceBeside:
    """What the engine's forward_backward is given to do beside the policy.

    Attributes:
        models: this stage's chunks of the reference.
        this_step: the pass of the step's micro-batches.
        next_step: the pass of the step after it; None: nothing is to be run ahead.
    """

    def __init__(self, models: Sequence[Any], ld_alpha: float | None) -> None:
        self.models, self.ld_alpha = models, ld_alpha
        self.this_step = ReferencePass.of([])
        self.next_step: ReferencePass | None = None

    def begin(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor | None]:
        """A step begins; the reference log-probs of its micro-batches, which are there when the policy needs them."""
        ahead, self.next_step = self.next_step, None
        group_ids = [micro_batch.group_ids for micro_batch in micro_batches]
        if ahead is not None and group_ids == [micro_batch.group_ids for micro_batch in ahead.micro_batches]:
            self.this_step = ahead
        else:
            self.this_step = ReferencePass.of(micro_batches)
        return self.this_step.logps

    def run_ahead(self, micro_batches: Sequence[MicroBatch]) -> None:
        """The step after this one has these micro-batches, and the reference does not move before it."""
        self.next_step = ReferencePass.of(micro_batches)
