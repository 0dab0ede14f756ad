"""What a schedule runs on this stage's model: a forward of a micro-batch, and the scalar whose backward gives gradients.

Axes: R responses of the micro-batch, S columns of the response sums, D those of them with a gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.model.attention.core import StreamParams
from megadpo.model.attention.prompt_kv import PromptKeys
from megadpo.model.heads.reward import RewardHead, reward_sums
from megadpo.model.router_load import RouterWatch
from megadpo.objectives.statistics import response_sums
from megadpo.parallel.context import all_scored, sum_over_context

ResponseGradient = Callable[[int, Tensor], Tensor]
"""(micro-batch number, its response sums [R, S], detached) -> d loss / d statistic [R, D] for the sums' first D columns
(statistics.DIFFERENTIABLE); called on the last stage only."""


def surrogate(
    model: Any,
    output: Tensor,
    number: int,
    micro_batch: MicroBatch,
    response_gradient: ResponseGradient,
    ld_alpha: float | None,
) -> Tensor:
    """The scalar to call backward on: sum(statistic x d loss / d statistic, held constant), whose gradient is the loss's."""
    sums_RS = sums_of(model, output, micro_batch, ld_alpha)
    gradient_RD = response_gradient(number, sums_RS.detach())
    return (sums_RS[:, : gradient_RD.shape[1]] * gradient_RD).sum()


def sums_of(model: Any, output: Tensor, micro_batch: MicroBatch, ld_alpha: float | None) -> Tensor:
    """Response sums [R, S] from the output of the last stage's model."""
    if isinstance(_unwrapped(model).output_layer, RewardHead):
        return sum_over_context(reward_sums(output, micro_batch), micro_batch)
    return sum_over_context(response_sums(all_scored(output, micro_batch), micro_batch, ld_alpha), micro_batch)


def join_halves(model: Any, outputs: Sequence[Tensor], micro_batch: MicroBatch) -> Tensor:
    """The output of the last stage's model for a whole micro-batch from its outputs for the two halves."""
    if isinstance(_unwrapped(model).output_layer, RewardHead):
        return torch.stack(list(outputs)).sum(0)  # zeros for the other half's answers
    halves = [all_scored(output, micro_batch.half(number)) for number, output in enumerate(outputs)]
    return torch.stack(halves).sum(0)


def _unwrapped(model: Any) -> Any:
    return getattr(model, "module", model)


def stage_forward(
    model: Any,
    micro_batch: MicroBatch,
    number: int,
    watch: RouterWatch | None,
    prompt_keys: PromptKeys | None = None,
) -> Tensor:
    """The output of this stage's model for a micro-batch. What the stage before it has sent was given to the model
    by Megatron, which calls this (`set_input_tensor`).

    Args:
        number: of the micro-batch in its step.
        watch: told what the routers of a mixture of experts do.
        prompt_keys: where the two halves of a micro-batch share the prompts' keys and values.
    """
    stage, local = _unwrapped(model), micro_batch.local
    stream = StreamParams(micro_batch=micro_batch, number=number, watch=watch, prompt_keys=prompt_keys)
    with stage.output_layer.reading(micro_batch) if stage.post_process else contextlib.nullcontext():
        return model(local.tokens_T[None], local.positions_T[None], None, packed_seq_params=stream)
