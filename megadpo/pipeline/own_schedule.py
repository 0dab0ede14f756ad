"""Micro-batches through the pipeline stages by our own schedules: 1F1B, interleaved over chunks, with the reference's
forwards among the policy's operations, or with gradients of weights apart (ZB-H1).

What an operation does to the model are Megatron's own functions for one forward and one backward, and the backwards of
each parameter come in the same order: gradients are the same bits as under Megatron's schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.utils import get_model_config
from torch import Tensor

from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.model.moe.load import RouterWatch
from megadpo.pipeline import fill
from megadpo.pipeline.interleaved_reference import InterleavedReference
from megadpo.pipeline.operations import ForwardOperations, PolicyOperations, num_halves, num_stages, run_schedule
from megadpo.pipeline.schedule import all_forwards
from megadpo.pipeline.simulate import Costs
from megadpo.pipeline.stage_ops import ResponseGradient


class OwnSchedule:
    """See `megadpo.pipeline.base.PipelineSchedule`."""

    def __init__(self, is_zero_bubble: bool = False, reference: InterleavedReference | None = None) -> None:
        """
        Args:
            is_zero_bubble: gradients of weights are operations of their own.
            reference: the reference whose forwards run among the policy's operations; each `forward_backward` is of the
                micro-batches that it has begun.
        """
        self.delays_weight_gradients, self.reference = is_zero_bubble, reference

    def forward_only(
        self,
        models: Sequence[Any],
        micro_batches: Sequence[MicroBatch],
        ld_alpha: float | None = None,
        watch: RouterWatch | None = None,
    ) -> list[Tensor]:
        sums: dict[int, Tensor] = {}
        operations = ForwardOperations(models, micro_batches, ld_alpha, sums.__setitem__, watch)
        run_schedule(
            all_forwards(num_stages(), len(micro_batches), len(models), num_halves=num_halves(micro_batches)),
            Costs(),
            operations,
        )
        return [sums[number] for number in range(len(sums))]

    def forward_backward(
        self,
        models: Sequence[Any],
        micro_batches: Sequence[MicroBatch],
        response_gradient: ResponseGradient,
        ld_alpha: float | None = None,
        watch: RouterWatch | None = None,
    ) -> None:
        operations = PolicyOperations(
            models, micro_batches, response_gradient, ld_alpha, watch, self.delays_weight_gradients
        )
        recomputes = get_model_config(models[0]).recompute_granularity == "full"
        costs = fill.rough_costs(recomputes, self.delays_weight_gradients)
        sizes = num_stages(), len(micro_batches), len(models), num_halves(micro_batches)
        policy = fill.policy_schedule(*sizes, self.delays_weight_gradients)
        if self.reference is None:
            run_schedule(policy, costs, operations)
        else:
            self.reference.run_among(policy, costs, operations)
        operations.finish_gradients()
