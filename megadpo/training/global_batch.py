"""The objective on a global batch that is spread over micro-batches and replicas: its gradient and its metrics' sums.

Most objectives are sums over groups: each micro-batch is evaluated by itself, with normalisers that are known from the data.

Where groups depend on each other there are two phases. A forward-only pass gives the statistics of this replica's
responses; a few numbers a response are gathered over the replicas; autograd of the pure objective on the whole batch
gives d loss / d statistic of every response. The second pass goes forward and backward with these held fixed, which
makes any objective of per-response statistics exact in any layout. It costs one more forward. KTO needs a single number
of the batch, its KL: a forward-only pass of its mismatched answers alone, under policy and reference.

Axes: R responses of a micro-batch (or of the batch, where it is evaluated whole), G groups, S columns of the response sums
(`statistics.RESPONSE_SUMS`), D those of them with a gradient, M metrics (`Objective.metric_names`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megadpo.data.batches.bin_packing import IntArray
from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.data.batches.packed_dataset import PackedDataset
from megadpo.data.rows.stream import Position
from megadpo.engine.base import Engine
from megadpo.metrics import collect
from megadpo.objectives.coupled import RunningMean
from megadpo.objectives.evaluate import evaluate
from megadpo.objectives.objective import Objective
from megadpo.objectives.statistics import ResponseStatistics, response_statistics
from megadpo.objectives.terms import Normalisers, normalisers_of
from megadpo.parallel.context import host_micro_batches, on_device
from megadpo.platform.device import compute_device

COLUMNS = tuple(item.name for item in fields(ResponseStatistics) if item.name.endswith("_R"))


@dataclass(frozen=True)
class GlobalBatch:
    """A global batch as this rank computes it.

    Attributes:
        group_ids: int64, its groups as places in the data set, those of all replicas.
        normalisers: what the losses are divided by.
        response_offsets_G: int64 [groups of the whole batch + 1], where each group's responses begin among all of them.
        micro_batches: this replica's.
        mismatched: those of KTO's mismatched prompts and answers; empty without KTO.
        packing: the data set that its groups are of.
        position: of a stream: where that is after them.
    """

    group_ids: IntArray
    normalisers: Normalisers
    response_offsets_G: Tensor
    micro_batches: Sequence[MicroBatch]
    mismatched: Sequence[MicroBatch] = ()
    packing: PackedDataset | None = None
    position: Position | None = None

    def on_device(self) -> GlobalBatch:
        """The same batch with its micro-batches on this rank's device; the mismatched ones stay where they are."""
        return replace(self, micro_batches=on_device(self.micro_batches))


def pack_global_batch(
    packing: PackedDataset, group_ids: IntArray, objective: Objective, normalisers: Normalisers | None = None
) -> GlobalBatch:
    """The groups `group_ids` of a data set, packed for this rank, in the processor's memory.

    Pure but for asking which rank this is: any thread may do it.

    Args:
        normalisers: None: those of these groups.
    """
    mismatched: list[MicroBatch] = []
    if objective.measures_kl:
        mismatched = host_micro_batches(packing.mismatched(group_ids), np.arange(len(group_ids)))
    return GlobalBatch(
        group_ids,
        normalisers or normalisers_of(packing.groups, group_ids),
        torch.from_numpy(packing.groups.response_offsets_of(group_ids)),
        host_micro_batches(packing, group_ids),
        mismatched,
        packing,
    )


def evaluate_micro_batch(
    objective: Objective,
    normalisers: Normalisers,
    micro_batch: MicroBatch,
    sums_RS: Tensor,
    reference_logps_R: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The objective on one micro-batch of a last stage.

    Args:
        sums_RS: its response sums under the policy.

    Returns:
        d loss / d statistic [R, D], and the metrics' sums [2 M] of its groups; float64.
    """
    assert reference_logps_R is not None or not objective.needs_reference, "the reference has not run: see Reference.begin"
    return _evaluate(objective, normalisers, response_statistics(sums_RS, reference_logps_R, micro_batch))


@dataclass(frozen=True)
class CoupledEvaluation:
    """An objective on a whole global batch.

    Attributes:
        gradients: d loss / d statistic [R, D] of each micro-batch of this replica; empty on stages without the head.
        metric_sums: [2 M], those of the whole batch on one replica, zeros on the others.
        running_mean: of the rewards, the batch's included when it is trained on; as before on stages without the head.
    """

    gradients: list[Tensor]
    metric_sums: Tensor
    running_mean: RunningMean


def evaluate_coupled(
    objective: Objective,
    normalisers: Normalisers,
    batch: GlobalBatch,
    sums: Sequence[Tensor],
    reference_logps: Sequence[Tensor | None],
    running_mean: RunningMean,
    is_training: bool,
) -> CoupledEvaluation:
    """The objective on all responses of a global batch at once. Collective over the replicas of last stages.

    Args:
        sums: response sums [R, S] of each micro-batch under the policy, on last stages.
        is_training: whether the running mean takes the batch's mean reward in; else it is used as it is.
    """
    metric_sums = collect.empty_vector(compute_device(), objective)
    if not parallel_state.is_pipeline_last_stage():
        return CoupledEvaluation([], metric_sums, running_mean)
    is_there = all(logps_R is not None for logps_R in reference_logps)
    assert is_there or not objective.needs_reference, "the reference has not run: see Reference.complete"
    statistics = _gather(batch, sums, reference_logps)
    if objective.runs_delta:
        if is_training:
            running_mean = running_mean.including(float(objective.responses(statistics).reward_R.mean()))
        normalisers = replace(normalisers, delta=running_mean.mean)
    gradient_RD, batch_metric_sums = _evaluate(objective, normalisers, statistics)
    if parallel_state.get_data_parallel_rank() == 0:  # all replicas have the same
        if objective.runs_delta:
            metric_sums += collect.scalar_sums("delta", running_mean.mean, objective, compute_device())
        metric_sums += batch_metric_sums
    gradients = [gradient_RD[_places_in_batch(batch, micro_batch)] for micro_batch in batch.micro_batches]
    return CoupledEvaluation(gradients, metric_sums, running_mean)


def mismatch_kl(
    engine: Engine, micro_batches: Sequence[MicroBatch], reference_logps: Sequence[Tensor | None], num_groups: int
) -> Tensor:
    """KTO's KL: the mean over `num_groups` mismatched answers of the global batch of log p - log p_reference, at least 0.

    Zero on stages without the head. Collective.
    """
    sums = engine.forward(micro_batches)
    total = torch.zeros((), dtype=torch.float64, device=compute_device())
    if parallel_state.is_pipeline_last_stage():
        for sums_RS, reference_R in zip(sums, reference_logps, strict=True):
            assert reference_R is not None
            total += (sums_RS[:, 0] - reference_R).sum()
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return (total / num_groups).clamp(min=0)


def kl_sums(kl: Tensor, objective: Objective) -> Tensor:
    """The metrics' sums [2 M] of KTO's KL: on the last stage of one replica, zeros elsewhere."""
    if parallel_state.is_pipeline_last_stage() and parallel_state.get_data_parallel_rank() == 0:
        return collect.scalar_sums("kl", kl, objective, compute_device())
    return collect.empty_vector(compute_device(), objective)


def _evaluate(objective: Objective, normalisers: Normalisers, statistics: ResponseStatistics) -> tuple[Tensor, Tensor]:
    evaluated = evaluate(statistics, normalisers, objective)
    return evaluated.gradient_RD, collect.sum_vector(statistics, evaluated, objective)


def _gather(batch: GlobalBatch, sums: Sequence[Tensor], reference_logps: Sequence[Tensor | None]) -> ResponseStatistics:
    """The statistics of the whole batch in the order of its groups, the same on every replica."""
    num_responses = int(batch.response_offsets_G[-1])
    table_RC = torch.zeros(num_responses, len(COLUMNS), dtype=torch.float64, device=compute_device())
    for sums_RS, reference_R, micro_batch in zip(sums, reference_logps, batch.micro_batches, strict=True):
        statistics = response_statistics(sums_RS, reference_R, micro_batch)
        columns_RC = torch.stack([getattr(statistics, name) for name in COLUMNS], dim=-1)
        table_RC[_places_in_batch(batch, micro_batch)] = columns_RC
    # Each response stands on one replica; the others add zeros.
    dist.all_reduce(table_RC, group=parallel_state.get_data_parallel_group())
    values = dict(zip(COLUMNS, table_RC.unbind(dim=-1), strict=True))
    return ResponseStatistics(**values, first_G=batch.response_offsets_G[:-1].to(table_RC.device))


def _places_in_batch(batch: GlobalBatch, micro_batch: MicroBatch) -> Tensor:
    """int64 [R]: the place in the whole batch of each response of a micro-batch."""
    offsets_G = batch.response_offsets_G[list(micro_batch.batch_positions)].to(micro_batch.group_R.device)
    within_R = torch.arange(micro_batch.num_responses, device=offsets_G.device) - micro_batch.first_G[micro_batch.group_R]
    return offsets_G[micro_batch.group_R] + within_R
