"""Between forward and backward: the objective on the responses of a global batch, its gradient and its metrics.

Most objectives are sums over pairs: each micro-batch is evaluated by itself, with normalisers that are known from the data.

Where pairs depend on each other there are two phases. A forward-only pass gives the statistics of this replica's
responses; a few numbers a response are gathered over the replicas; autograd of the pure objective on the whole batch
gives d loss / d statistic of every response. The second pass goes forward and backward with these held fixed, which
makes any objective of per-response statistics exact in any layout. It costs one more forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megadpo.config import ObjectiveConfig
from megadpo.data.micro_batch import MicroBatch
from megadpo.metrics import collect
from megadpo.objectives.evaluate import Evaluated, evaluate
from megadpo.objectives.specs import couples_batch
from megadpo.objectives.statistics import ResponseStatistics, pair_statistics
from megadpo.objectives.terms import Normalisers
from megadpo.parallel.engine import Engine, ResponseGradient
from megadpo.platform.device import compute_device

COLUMNS = tuple(item.name for item in fields(ResponseStatistics) if item.name.endswith("_R"))


@dataclass(frozen=True)
class Batch:
    """A global batch as this rank has it.

    Attributes:
        num_pairs: of the whole batch.
        micro_batches: this replica's.
        reference_logps: [R] for each of them (None: no reference); asked for on last stages only.
        totals: sums of metrics, see metrics/collect.py; added to.
    """

    options: ObjectiveConfig
    normalisers: Normalisers
    num_pairs: int
    micro_batches: Sequence[MicroBatch]
    reference_logps: Sequence[Tensor | None]
    totals: Tensor


def response_gradient(batch: Batch, engine: Engine) -> ResponseGradient:
    """What the engine asks on last stages: d loss / d statistic of a micro-batch's responses."""
    if couples_batch(batch.options.loss_types):
        gradients = evaluate_batch(batch, engine.forward(batch.micro_batches, batch.options.ld_alpha))
        return lambda number, sums_RS: gradients[number]
    return lambda number, sums_RS: _evaluate_one(batch, number, sums_RS)


def evaluate_batch(batch: Batch, sums: Sequence[Tensor]) -> list[Tensor]:
    """The objective on the response sums of all micro-batches: the gradient [R, D] of each; metrics go to `totals`.

    On stages without the head there are no sums and nothing is done. Collective over replicas for coupled objectives.
    """
    if not parallel_state.is_pipeline_last_stage():
        return []
    if not couples_batch(batch.options.loss_types):
        return [_evaluate_one(batch, number, sums_RS) for number, sums_RS in enumerate(sums)]
    statistics = _gather(batch, sums)
    evaluated = evaluate(statistics, batch.normalisers, batch.options)
    if parallel_state.get_data_parallel_rank() == 0:  # all replicas have the same: one of them tells
        _add_metrics(batch, statistics, evaluated)
    gradient_P2D = evaluated.gradient_RD.view(batch.num_pairs, 2, -1)
    return [gradient_P2D[list(micro_batch.places)].flatten(0, 1) for micro_batch in batch.micro_batches]


def _evaluate_one(batch: Batch, number: int, sums_RS: Tensor) -> Tensor:
    statistics = pair_statistics(sums_RS, batch.reference_logps[number], batch.micro_batches[number])
    evaluated = evaluate(statistics, batch.normalisers, batch.options)
    _add_metrics(batch, statistics, evaluated)
    return evaluated.gradient_RD


def _add_metrics(batch: Batch, statistics: ResponseStatistics, evaluated: Evaluated) -> None:
    several = evaluated.term_losses if len(evaluated.term_losses) > 1 else None
    batch.totals.add_(collect.sum_vector(statistics, evaluated.losses_P, evaluated.rewards_R, several))


def _gather(batch: Batch, sums: Sequence[Tensor]) -> ResponseStatistics:
    """The statistics of the whole batch in the order of its pairs, the same on every replica."""
    table_P2C = torch.zeros(batch.num_pairs, 2, len(COLUMNS), dtype=torch.float64, device=compute_device())
    for sums_RS, reference_R, micro_batch in zip(sums, batch.reference_logps, batch.micro_batches, strict=True):
        statistics = pair_statistics(sums_RS, reference_R, micro_batch)
        columns_RC = torch.stack([getattr(statistics, name) for name in COLUMNS], dim=-1)
        table_P2C[list(micro_batch.places)] = columns_RC.view(-1, 2, len(COLUMNS))
    # Each pair stands on one replica; the others add zeros.
    dist.all_reduce(table_P2C, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    values = dict(zip(COLUMNS, table_P2C.flatten(0, 1).unbind(dim=-1), strict=True))
    chosen_P = torch.arange(0, 2 * batch.num_pairs, 2, device=table_P2C.device)
    return ResponseStatistics(**values, chosen_P=chosen_P, rejected_P=chosen_P + 1)
