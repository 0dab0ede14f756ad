"""An optimizer step on a global batch: the one that the trainer takes, and the tests that look at a step.

The reference's log-probs, forward and backward with the objective between them, gradients finished, the update. Metrics and
BCO's running mean come back as values.

Axes as in global_batch.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.engine.base import Engine
from megadpo.metrics import collect
from megadpo.model.adapters.attach import inputs_dropped
from megadpo.model.neftune import noise_added
from megadpo.objectives.coupled import RunningMean
from megadpo.objectives.objective import Objective
from megadpo.objectives.terms import Normalisers
from megadpo.parallel.context import is_first_rank_of_stage, on_device
from megadpo.platform.device import compute_device
from megadpo.platform.step_clock import part
from megadpo.training.global_batch import GlobalBatch, evaluate_coupled, evaluate_micro_batch, kl_sums, mismatch_kl
from megadpo.training.reference import Reference
from megadpo.training.stop import Stopping


@dataclass(frozen=True)
class StepResult:
    """What a step gives back, on this rank.

    Attributes:
        micro_batches: this rank's, on its device.
        metric_sums: float64 [2 M], this rank's part of the metrics' sums, see metrics/collect.py and `reduce_metrics`.
        running_mean: of the rewards, this step's included where the objective has one; known on last stages.
        grad_norm: global gradient norm before clipping.
        response_sums: [R, S] of each micro-batch on last stages, see `statistics.RESPONSE_SUMS`; elsewhere empty.
        reference_logps: [R] of each micro-batch on last stages, None without a reference.
    """

    micro_batches: Sequence[MicroBatch]
    metric_sums: Tensor
    running_mean: RunningMean
    grad_norm: float
    response_sums: list[Tensor]
    reference_logps: list[Tensor | None]


def optimizer_step(
    engine: Engine,
    reference: Reference,
    batch: GlobalBatch,
    objective: Objective,
    running_mean: RunningMean,
    learning_rate: float,
    following: Callable[[], GlobalBatch] | None = None,
    on_gradients: Callable[[], None] | None = None,
    accepts: Callable[[StepResult], bool] | None = None,
) -> StepResult:
    """Train on one global batch. Collective.

    Args:
        running_mean: of the rewards of the steps before (BCO).
        following: gives the next step's batch, for a reference that runs ahead; None where there is no next step or the
            reference moves before it.
        on_gradients: called when `engine.gradients()` are finished, before the update.
        accepts: asked with what will be given back, before the update; where it says no, on every rank, nothing is updated.

    Raises:
        ArithmeticError: without `accepts`, the gradient norm is not finite; the parameters are left as they were.
    """
    batch = batch.on_device()
    normalisers, metric_sums = _measure_kl(engine, reference, batch, objective)
    with part("reference"):
        reference_logps = reference.begin(batch.group_ids, batch.micro_batches)
    if following is not None:
        reference.run_ahead(following)
    gradients: list[Tensor] = []
    if objective.couples_batch:
        with part("reference"):
            reference.complete()  # the whole batch is evaluated before anything goes backward
        with noise_added(engine.stage), part("forward"):
            first_sums = engine.forward(batch.micro_batches, objective.ld_alpha)
            coupled = evaluate_coupled(
                objective, normalisers, batch, first_sums, reference_logps, running_mean, is_training=True
            )
        gradients, running_mean = coupled.gradients, coupled.running_mean
        metric_sums += coupled.metric_sums
    response_sums: dict[int, Tensor] = {}

    def response_gradient(number: int, sums_RS: Tensor) -> Tensor:
        """The objective: called on last stages between the forward and the backward of each micro-batch."""
        response_sums[number] = sums_RS
        if objective.couples_batch:
            return gradients[number]
        micro_batch, reference_R = batch.micro_batches[number], reference_logps[number]
        gradient_RD, own_metric_sums = evaluate_micro_batch(objective, normalisers, micro_batch, sums_RS, reference_R)
        metric_sums.add_(own_metric_sums)
        return gradient_RD

    with inputs_dropped(engine.stage.models), noise_added(engine.stage), part("forward"):
        engine.forward_backward(batch.micro_batches, response_gradient, objective.ld_alpha)
    with part("communication"):
        engine.finish_gradients()
    if on_gradients is not None:
        on_gradients()

    def result(grad_norm: float) -> StepResult:
        return StepResult(
            batch.micro_batches,
            metric_sums,
            running_mean,
            grad_norm,
            [response_sums[number] for number in sorted(response_sums)],
            list(reference_logps),
        )

    with part("optimizer"):
        grad_norm = engine.step(learning_rate, None if accepts is None else lambda norm: accepts(result(norm)))
    with part("reference"):
        reference.finish()
    return result(grad_norm)


def evaluate_batch(
    engine: Engine,
    reference: Reference,
    batch: GlobalBatch,
    objective: Objective,
    running_mean: RunningMean,
    seen: Callable[[MicroBatch, Tensor, Tensor | None], None] | None = None,
) -> Tensor:
    """The metrics' sums [2 M] of one global batch, see `StepResult`, without gradients: nothing changes. Collective.

    Under router replay the policy chooses its experts itself, as the model that is exported does.

    Args:
        seen: on last stages called with each micro-batch, its response sums [R, S] and the reference's log-probs [R].
    """
    with _own_routes(engine):
        batch = batch.on_device()
        normalisers, metric_sums = _measure_kl(engine, reference, batch, objective)
        reference_logps = reference.logps(batch.micro_batches)
        sums = engine.forward(batch.micro_batches, objective.ld_alpha)
        for micro_batch, sums_RS, reference_R in zip(batch.micro_batches, sums, reference_logps, strict=False):
            if seen is not None:
                seen(micro_batch, sums_RS, reference_R)
        if objective.couples_batch:
            coupled = evaluate_coupled(objective, normalisers, batch, sums, reference_logps, running_mean, is_training=False)
            return metric_sums + coupled.metric_sums
        for number, sums_RS in enumerate(sums):
            micro_batch, reference_R = batch.micro_batches[number], reference_logps[number]
            metric_sums += evaluate_micro_batch(objective, normalisers, micro_batch, sums_RS, reference_R)[1]
        return metric_sums


@contextlib.contextmanager
def _own_routes(engine: Engine) -> Iterator[None]:
    """Within, the policy's routers choose."""
    routes, engine.routes = engine.routes, None
    try:
        yield
    finally:
        engine.routes = routes


def reduce_metrics(
    metric_sums: Tensor, objective: Objective, prefix: str = "", stopping: Stopping | None = None
) -> dict[str, float]:
    """Metrics of the whole world, each name behind `prefix`, the same on every rank. Collective; changes `metric_sums`.

    Of the tensor and context ranks that have the same sums one counts.

    Args:
        stopping: takes part with this rank's vote and learns the sum of all votes.
    """
    if not is_first_rank_of_stage():
        metric_sums.zero_()
    if stopping is None:
        dist.all_reduce(metric_sums)
        return collect.reduce(metric_sums, objective, prefix)
    with_vote = F.pad(metric_sums, (0, 1), value=stopping.vote())
    dist.all_reduce(with_vote)
    *sums, votes = with_vote.tolist()
    stopping.count(votes)
    return collect.reduce(sums, objective, prefix)


def _measure_kl(
    engine: Engine, reference: Reference, batch: GlobalBatch, objective: Objective
) -> tuple[Normalisers, Tensor]:
    """The batch's normalisers, with KTO's KL where it is read, and the metrics' sums with it alone."""
    if not objective.measures_kl:
        return batch.normalisers, collect.empty_vector(compute_device(), objective)
    mismatched = on_device(batch.mismatched)
    with part("reference"):
        mismatched_logps = reference.logps(mismatched)
    with part("forward"):
        kl = mismatch_kl(engine, mismatched, mismatched_logps, len(batch.group_ids))
    return replace(batch.normalisers, kl=kl), kl_sums(kl, objective)
