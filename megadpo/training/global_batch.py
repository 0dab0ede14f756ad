"""Between forward and backward: the objective on the responses of a global batch, its gradient and its metrics.

Most objectives are sums over groups: each micro-batch is evaluated by itself, with normalisers that are known from the data.

Where groups depend on each other there are two phases. A forward-only pass gives the statistics of this replica's
responses; a few numbers a response are gathered over the replicas; autograd of the pure objective on the whole batch
gives d loss / d statistic of every response. The second pass goes forward and backward with these held fixed, which
makes any objective of per-response statistics exact in any layout. It costs one more forward. KTO needs a single number
of the batch, its KL: a forward-only pass of its mismatched answers alone, under policy and reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megadpo.config.schema import ObjectiveConfig
from megadpo.data.batches.bin_packing import IntArray
from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.data.batches.packed_dataset import PackedDataset
from megadpo.engine.base import Engine
from megadpo.metrics import collect
from megadpo.objectives.evaluate import Evaluated, evaluate, responses_of
from megadpo.objectives.specs import couples_batch, measures_kl, runs_delta
from megadpo.objectives.statistics import ResponseStatistics, response_statistics
from megadpo.objectives.terms import Normalisers
from megadpo.parallel.context import host_micro_batches, on_device
from megadpo.pipeline.interleaved_reference import InterleavedReference
from megadpo.pipeline.stage_ops import ResponseGradient
from megadpo.platform.device import compute_device
from megadpo.training.reference import Reference

COLUMNS = tuple(item.name for item in fields(ResponseStatistics) if item.name.endswith("_R"))


@dataclass(frozen=True)
class Batch:
    """A global batch as this rank has it.

    Attributes:
        response_offsets_G: int64 [groups of the whole batch + 1], where each group's responses begin among all of them.
        micro_batches: this replica's.
        reference_logps: [R] for each of them (None: no reference); asked for on last stages only.
        totals: sums of metrics, see metrics/collect.py; added to.
        delta_of: the batch's mean reward -> BCO's delta.
    """

    options: ObjectiveConfig
    normalisers: Normalisers
    response_offsets_G: Tensor
    micro_batches: Sequence[MicroBatch]
    reference_logps: Sequence[Tensor | None]
    totals: Tensor
    delta_of: Callable[[float], float]


@dataclass(frozen=True)
class Streams:
    """What this rank computes of a global batch, in the processor's memory.

    Attributes:
        micro_batches: this replica's.
        mismatched: those of KTO's mismatched prompts and answers; empty without KTO.
    """

    micro_batches: Sequence[MicroBatch]
    mismatched: Sequence[MicroBatch] = ()


def streams_of(packing: PackedDataset, numbers: IntArray, options: ObjectiveConfig) -> Streams:
    """The groups `numbers`, packed for this rank. Pure but for asking which rank this is: any thread may do it ahead."""
    mismatched: list[MicroBatch] = []
    if measures_kl(options.loss_types):
        mismatched = host_micro_batches(packing.mismatched(numbers), np.arange(len(numbers)))
    return Streams(host_micro_batches(packing, numbers), mismatched)


def global_batch(
    engine: Engine,
    packing: PackedDataset,
    reference: Reference,
    numbers: IntArray,
    normalisers: Normalisers,
    options: ObjectiveConfig,
    delta_of: Callable[[float], float],
    streams: Streams | None = None,
    interleaved: InterleavedReference | None = None,
) -> Batch:
    """The groups `numbers`, packed for this rank, with the reference's log-probs and KTO's KL where it is needed.

    Collective.

    Args:
        streams: what `streams_of` gives, where it was made ahead.
        interleaved: where the reference of these groups runs among the policy's operations.
    """
    streams = streams or streams_of(packing, numbers, options)
    micro_batches = on_device(streams.micro_batches)
    totals = collect.empty_vector(compute_device(), options)
    if measures_kl(options.loss_types):
        others = on_device(streams.mismatched)
        normalisers = replace(normalisers, kl=mismatch_kl(engine, others, reference(others), len(numbers)))
        if parallel_state.is_pipeline_last_stage() and parallel_state.get_data_parallel_rank() == 0:
            collect.add_fixed(totals, "kl", normalisers.kl, options)
    offsets_G = torch.from_numpy(packing.groups.response_offsets_of(numbers))
    reference_logps = reference(micro_batches) if interleaved is None else interleaved.begin(micro_batches)
    if interleaved is not None and couples_batch(options):
        interleaved.complete()  # the whole batch is evaluated before anything goes backward
    return Batch(options, normalisers, offsets_G, micro_batches, reference_logps, totals, delta_of)


def response_gradient(batch: Batch, engine: Engine) -> ResponseGradient:
    """What the engine asks on last stages: d loss / d statistic of a micro-batch's responses."""
    if couples_batch(batch.options):
        gradients = evaluate_batch(batch, engine.forward(batch.micro_batches, batch.options.ld_alpha))
        return lambda number, sums_RS: gradients[number]
    return lambda number, sums_RS: _evaluate_one(batch, number, sums_RS)


def evaluate_batch(batch: Batch, sums: Sequence[Tensor]) -> list[Tensor]:
    """The objective on the response sums of all micro-batches: the gradient [R, D] of each; metrics go to `totals`.

    On stages without the head there are no sums and nothing is done. Collective over replicas for coupled objectives.
    """
    if not parallel_state.is_pipeline_last_stage():
        return []
    if not couples_batch(batch.options):
        return [_evaluate_one(batch, number, sums_RS) for number, sums_RS in enumerate(sums)]
    statistics, normalisers = _gather(batch, sums), batch.normalisers
    is_teller = parallel_state.get_data_parallel_rank() == 0  # all replicas have the same: one of them tells
    if runs_delta(batch.options):
        mean_reward = responses_of(statistics, batch.options).reward_R.mean()
        normalisers = replace(normalisers, delta=batch.delta_of(float(mean_reward)))
        if is_teller:
            collect.add_fixed(batch.totals, "delta", normalisers.delta, batch.options)
    evaluated = evaluate(statistics, normalisers, batch.options)
    if is_teller:
        batch.totals.add_(collect.sum_vector(statistics, evaluated, batch.options))
    return [evaluated.gradient_RD[_numbers_in_batch(batch, micro_batch)] for micro_batch in batch.micro_batches]


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


def _evaluate_one(batch: Batch, number: int, sums_RS: Tensor) -> Tensor:
    statistics = response_statistics(sums_RS, batch.reference_logps[number], batch.micro_batches[number])
    evaluated: Evaluated = evaluate(statistics, batch.normalisers, batch.options)
    batch.totals.add_(collect.sum_vector(statistics, evaluated, batch.options))
    return evaluated.gradient_RD


def _gather(batch: Batch, sums: Sequence[Tensor]) -> ResponseStatistics:
    """The statistics of the whole batch in the order of its groups, the same on every replica."""
    num_responses = int(batch.response_offsets_G[-1])
    table_RC = torch.zeros(num_responses, len(COLUMNS), dtype=torch.float64, device=compute_device())
    for sums_RS, reference_R, micro_batch in zip(sums, batch.reference_logps, batch.micro_batches, strict=True):
        statistics = response_statistics(sums_RS, reference_R, micro_batch)
        columns_RC = torch.stack([getattr(statistics, name) for name in COLUMNS], dim=-1)
        table_RC[_numbers_in_batch(batch, micro_batch)] = columns_RC
    # Each response stands on one replica; the others add zeros.
    dist.all_reduce(table_RC, group=parallel_state.get_data_parallel_group())
    values = dict(zip(COLUMNS, table_RC.unbind(dim=-1), strict=True))
    return ResponseStatistics(**values, first_G=batch.response_offsets_G[:-1].to(table_RC.device))


def _numbers_in_batch(batch: Batch, micro_batch: MicroBatch) -> Tensor:
    """int64 [R]: the number in the whole batch of each response of a micro-batch."""
    offsets_G = batch.response_offsets_G[list(micro_batch.batch_positions)].to(micro_batch.group_R.device)
    within_R = torch.arange(micro_batch.num_responses, device=offsets_G.device) - micro_batch.first_G[micro_batch.group_R]
    return offsets_G[micro_batch.group_R] + within_R
