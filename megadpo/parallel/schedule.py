"""Micro-batches through the pipeline stages, by Megatron's schedules (1F1B where there are several stages)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megadpo.data.micro_batch import MicroBatch
from megadpo.model.attention import StreamParams
from megadpo.model.head import LogProbHead
from megadpo.model.reward_head import RewardHead, reward_sums
from megadpo.objectives.statistics import response_sums
from megadpo.parallel.engine import ResponseGradient


def forward_only(model: Any, micro_batches: Sequence[MicroBatch], ld_alpha: float | None = None) -> list[Tensor]:
    """Response sums [R, S] of each micro-batch on the last stage (elsewhere an empty list), without gradients."""
    with torch.no_grad():
        outputs = _run(model, micro_batches, lambda number, micro_batch: None, forward_only=True)
        return [
            _sums(model, output, micro_batch, ld_alpha) for output, micro_batch in zip(outputs, micro_batches, strict=False)
        ]


def forward_backward(
    model: Any, micro_batches: Sequence[MicroBatch], response_gradient: ResponseGradient, ld_alpha: float | None = None
) -> None:
    """Forward and backward of every micro-batch.

    The scalar handed to Megatron is sum(d loss / d statistic, held fixed, x statistic): its gradient is the loss's.
    """

    def surrogate_of(number: int, micro_batch: MicroBatch) -> Callable[[Tensor], tuple[Tensor, Tensor, None]]:
        def surrogate(output: Tensor) -> tuple[Tensor, Tensor, None]:
            sums_RS = _sums(model, output, micro_batch, ld_alpha)
            gradient_RD = response_gradient(number, sums_RS.detach())
            differentiable_RD = sums_RS[:, : gradient_RD.shape[1]]
            return (differentiable_RD * gradient_RD).sum(), torch.zeros((), dtype=torch.int, device=output.device), None

        return surrogate

    _run(model, micro_batches, surrogate_of, forward_only=False)


def _run(model: Any, micro_batches: Sequence[MicroBatch], loss_of: Any, forward_only: bool) -> list[Any]:
    def stage_forward(numbered: Iterator[tuple[int, MicroBatch]], model: Any) -> tuple[Tensor, Any]:
        number, micro_batch = next(numbered)
        return _stage_forward(model, micro_batch), loss_of(number, micro_batch)

    longest = max(len(micro_batch.tokens_T) for micro_batch in micro_batches)
    return get_forward_backward_func()(
        forward_step_func=stage_forward,
        data_iterator=iter(enumerate(micro_batches)),
        model=[model],
        num_microbatches=len(micro_batches),
        seq_length=longest,
        micro_batch_size=1,
        decoder_seq_length=longest,
        forward_only=forward_only,
    )


def _sums(model: Any, output: Tensor, micro_batch: MicroBatch, ld_alpha: float | None) -> Tensor:
    if isinstance(_unwrapped(model).output_layer, RewardHead):
        return reward_sums(output, micro_batch)
    return response_sums(output, micro_batch, ld_alpha)


def _unwrapped(model: Any) -> Any:
    return getattr(model, "module", model)


def _stage_forward(model: Any, micro_batch: MicroBatch) -> Tensor:
    stage = _unwrapped(model)
    if stage.post_process:
        head: LogProbHead | RewardHead = stage.output_layer
        head.micro_batch = micro_batch
    stream = StreamParams(micro_batch=micro_batch)
    return model(micro_batch.tokens_T[None], micro_batch.positions_T[None], None, packed_seq_params=stream)
