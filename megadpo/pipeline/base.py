"""What engines and references ask of a pipeline schedule: bring micro-batches through the stages of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.model.moe.load import RouterWatch
from megadpo.pipeline.stage_ops import ResponseGradient


class PipelineSchedule(Protocol):
    """Collective over the ranks of a pipeline: each calls it with its own chunks and the same micro-batches."""

    @property
    def delays_weight_gradients(self) -> bool:
        """Whether gradients of weights are operations of their own, which the linear layers must delay for that
        (`model.weight_gradients`)."""
        ...

    def forward_only(
        self,
        models: Sequence[Any],
        micro_batches: Sequence[MicroBatch],
        ld_alpha: float | None = None,
        watch: RouterWatch | None = None,
    ) -> list[Tensor]:
        """Response sums [R, S] of each micro-batch on the last stage, elsewhere an empty list; no gradients.

        Args:
            models: this stage's chunks.
            watch: told what the routers of a mixture of experts do.
        """
        ...

    def forward_backward(
        self,
        models: Sequence[Any],
        micro_batches: Sequence[MicroBatch],
        response_gradient: ResponseGradient,
        ld_alpha: float | None = None,
        watch: RouterWatch | None = None,
    ) -> None:
        """Forward and backward of every micro-batch; gradients are added up on each rank."""
        ...
