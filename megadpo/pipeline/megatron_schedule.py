"""Micro-batches through the pipeline stages, by Megatron's schedules (1F1B where there are several stages,
interleaved where these have several chunks)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.model.router_load import RouterWatch
from megadpo.pipeline.stage_ops import ResponseGradient, stage_forward, sums_of, surrogate

MegatronLoss = Callable[[Tensor], tuple[Tensor, Tensor, None]]
"""A micro-batch's output -> (the scalar that goes backward, a number of tokens, what Megatron would report). By the tokens
nothing is divided (`calculate_per_token_loss`, model/megatron_config.py), so 0 is as good as any; nothing is reported."""


class MegatronSchedule:
    """See `megadpo.pipeline.base.PipelineSchedule`."""

    delays_weight_gradients = False

    def forward_only(
        self,
        models: Sequence[Any],
        micro_batches: Sequence[MicroBatch],
        ld_alpha: float | None = None,
        watch: RouterWatch | None = None,
    ) -> list[Tensor]:
        with torch.no_grad():
            outputs = _run(models, micro_batches, None, watch)
            return [
                sums_of(models[-1], output, micro_batch, ld_alpha)
                for output, micro_batch in zip(outputs, micro_batches, strict=False)
            ]

    def forward_backward(
        self,
        models: Sequence[Any],
        micro_batches: Sequence[MicroBatch],
        response_gradient: ResponseGradient,
        ld_alpha: float | None = None,
        watch: RouterWatch | None = None,
    ) -> None:
        def loss_of(number: int, micro_batch: MicroBatch) -> MegatronLoss:
            def loss(output: Tensor) -> tuple[Tensor, Tensor, None]:
                scalar = surrogate(models[-1], output, number, micro_batch, response_gradient, ld_alpha)
                return scalar, torch.zeros((), dtype=torch.int, device=output.device), None

            return loss

        _run(models, micro_batches, loss_of, watch)


def _run(
    models: Sequence[Any],
    micro_batches: Sequence[MicroBatch],
    loss_of: Callable[[int, MicroBatch], MegatronLoss] | None,
    watch: RouterWatch | None,
) -> list[Any]:
    """Megatron's schedule for these chunks; without `loss_of` forward only, and the outputs of the last stage."""

    def forward_step(numbered: Iterator[tuple[int, MicroBatch]], model: Any) -> tuple[Tensor, MegatronLoss | None]:
        number, micro_batch = next(numbered)
        loss = None if loss_of is None else loss_of(number, micro_batch)
        return stage_forward(model, micro_batch, number, watch), loss

    longest = max(len(micro_batch.tokens_T) for micro_batch in micro_batches)
    # Every chunk goes through all micro-batches; a lone one is given alone.
    iterators = [iter(enumerate(micro_batches)) for _ in models]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(models) > 1 else iterators[0],
        model=list(models),
        num_microbatches=len(micro_batches),
        seq_length=longest,
        micro_batch_size=1,
        decoder_seq_length=longest,
        forward_only=loss_of is None,
    )
