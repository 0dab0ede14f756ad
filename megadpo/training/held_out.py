"""Evaluation in the step loop: each held-out set on its own, a user's own metrics, the best one, and whether the run ends.

Every function here is collective, and gives the same on every rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megadpo.config.sources import eval_prefix
from megadpo.console.activity import counted_through
from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.data.batches.packed_dataset import PackedDataset
from megadpo.data.rows.report import counted
from megadpo.errors import UserError
from megadpo.metrics import collect
from megadpo.objectives.statistics import response_statistics
from megadpo.objectives.terms import normalisers_of
from megadpo.parallel.agreement import first_problem, from_all_ranks, problem_of
from megadpo.parallel.context import is_first_rank_of_stage
from megadpo.parallel.world import rank
from megadpo.platform.device import compute_device
from megadpo.training.callbacks import EvaluatedSet, Metrics, checked_metrics, is_no
from megadpo.training.global_batch import pack_global_batch
from megadpo.training.run import Run
from megadpo.training.step import evaluate_batch, reduce_metrics
from megadpo.validation.evaluation import check_best_metric, metrics_of_evaluation

COLUMNS = ("logps_R", "reference_logps_R", "num_tokens_R", "label_R")
"""Of the statistics, what a user's own metrics are made of; the reward comes last."""


def ask(run: Run, name: str, *arguments: Any) -> None:
    """Call a user's function on rank 0; where it says no, the run ends."""
    if name not in run.heard:
        return
    answer = getattr(run.callbacks, name)(*arguments) if rank() == 0 else None
    votes = torch.full((1,), float(is_no(answer)), device=compute_device())
    dist.all_reduce(votes)
    if votes.item():
        run.end(f"{name} returned False", by="callback")


def evaluate_and_write(run: Run, step: int) -> bool:
    """An evaluation after `step` with a record of its own; whether it is the best so far. Nothing where the run is to stop:
    then it is due when the run goes on."""
    held_out = evaluation(run)
    if not held_out:
        return False
    run.metrics |= held_out
    run.write({"step": step, **held_out, "time": time.time()})
    return take(run, step, held_out)


def take(run: Run, step: int, held_out: Metrics) -> bool:
    """Look at what an evaluation has given: whether it is the best so far. The run may end by it.

    Raises:
        UserError: `eval.best_metric` is not among it.
    """
    config, best = run.setup.config, run.best
    if best.metric is not None and best.metric not in held_out:
        check_best_metric(config, own=set(held_out) - set(metrics_of_evaluation(config)))
    # Before the first step nothing was trained that could be kept.
    is_best = step > 0 and best.take(step, held_out)
    if best.is_out_of_patience:
        assert best.metric is not None
        known = "was never a number" if best.step is None else f"is best at step {best.step}, {best.value:.4g}"
        since = counted(best.num_without, "evaluation")
        run.end(f"{best.metric} {known}, and {since} since then brought nothing better", by="patience")
    ask(run, "on_evaluation", step, held_out)
    return is_best


def evaluation(run: Run) -> Metrics:
    """The metrics of all held-out sets, under names that begin with "eval_" or "eval_NAME_".

    Nothing where the run is to stop: then the evaluation is due when the run goes on.

    Raises:
        UserError: a user's own metrics are none.
    """
    run.progress.begin("evaluating")
    found: Metrics = {}
    for name, packing in run.setup.eval.items():
        of_set = _of_set(run, name, packing, found)
        if of_set is None:
            run.evaluation_due = True
            return {}
        found |= of_set
    run.evaluation_due = False
    return found


def _of_set(run: Run, name: str, packing: PackedDataset, others: Metrics) -> Metrics | None:
    """Loss, rewards and so on of one set, beside those of `others`; None where the run is to stop."""
    setup, objective, started = run.setup, run.setup.objective, time.perf_counter()
    num_groups, at_once = len(packing.groups), setup.config.train.pairs_per_step
    normalisers = normalisers_of(packing.groups, range(num_groups))
    metric_sums = collect.empty_vector(compute_device(), objective)
    has_own = "compute_metrics" in run.heard
    table_RC = torch.zeros(packing.groups.num_responses, len(COLUMNS) + 1, dtype=torch.float64) if has_own else None
    what, num_batches = f"evaluating {name}".rstrip(), -(-num_groups // at_once)
    for start in counted_through(range(0, num_groups, at_once), what, num_batches, "batches"):
        group_ids = np.arange(start, min(start + at_once, num_groups))
        if run.stopping.agreed is not None or run.stopping.agree():
            return None
        batch = pack_global_batch(packing, group_ids, objective, normalisers)
        seen = None if table_RC is None else _noting(run, packing, table_RC)
        metric_sums += evaluate_batch(run.engine, run.references.eval[name], batch, objective, run.running_mean, seen)
    prefix = eval_prefix(name)
    metrics = reduce_metrics(metric_sums, objective, prefix)
    metrics[f"{prefix}seconds"] = time.perf_counter() - started
    return metrics if table_RC is None else metrics | _own_metrics(run, name, packing, table_RC, metrics, others)


def _noting(run: Run, packing: PackedDataset, table_RC: Tensor) -> Callable[[MicroBatch, Tensor, Tensor | None], None]:
    """Takes each micro-batch's response sums and reference log-probs, on the ranks that have something to say of them."""
    objective = run.setup.objective

    def note(micro_batch: MicroBatch, sums_RS: Tensor, reference_R: Tensor | None) -> None:
        if not (parallel_state.is_pipeline_last_stage() and is_first_rank_of_stage()):
            return
        statistics = response_statistics(sums_RS, reference_R, micro_batch)
        columns = [getattr(statistics, column) for column in COLUMNS]
        columns.append(objective.reward(objective.responses(statistics)))
        places = torch.from_numpy(packing.groups.response_ids_of(micro_batch.group_ids))
        table_RC[places] = torch.stack([column.detach().double() for column in columns], dim=-1).cpu()

    return note


def _own_metrics(
    run: Run, name: str, packing: PackedDataset, table_RC: Tensor, metrics: Metrics, others: Metrics
) -> Metrics:
    """What the user's function makes of a set.

    Args:
        table_RC: this rank's responses, zeros for the others.

    Raises:
        UserError: it gives something else than names and numbers.
    """
    on_device = table_RC.to(compute_device())
    dist.all_reduce(on_device)
    found: Metrics = {}

    def compute() -> None:
        logps, reference_logps, lengths, labels, rewards = on_device.cpu().numpy().T
        groups = packing.groups
        evaluated = EvaluatedSet(
            name=name,
            kind=run.setup.objective.kind,
            rows=np.asarray(groups.rows),
            groups=np.repeat(np.arange(len(groups)), np.diff(groups.response_offsets_G)),
            logps=logps,
            reference_logps=reference_logps,
            lengths=lengths.astype(np.int64),
            rewards=rewards,
            labels=labels,
            metrics={metric.removeprefix(eval_prefix(name)): value for metric, value in metrics.items()},
        )
        assert run.callbacks.compute_metrics is not None
        known = {*metrics, *metrics_of_evaluation(run.setup.config), *others}
        found.update(checked_metrics(run.callbacks.compute_metrics(evaluated), eval_prefix(name), known))

    problem = first_problem(problem_of(compute) if rank() == 0 else None)
    if problem is not None:
        raise UserError(problem)
    first: Metrics = from_all_ranks(found)[0]
    return first
