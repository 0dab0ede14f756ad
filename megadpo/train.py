"""Training, from a configuration to a Hugging Face directory: the story on one page.

prepare  rows -> groups -> tokens, layout and model checked, all before processes are joined
build    this rank's stage of the policy, the reference, the engine
loop     batch -> micro-batches -> log-probs -> objective -> gradients -> step -> metrics, evaluation, checkpoint
export   the trained model as a Hugging Face directory
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadpo.config import Config
from megadpo.data.micro_batch import MicroBatch
from megadpo.data.packing import Packing
from megadpo.data.prepare import cache_root
from megadpo.errors import UserError
from megadpo.learning_rate import learning_rate_at
from megadpo.metrics import collect
from megadpo.metrics.sinks import Sink, open_sinks
from megadpo.metrics.throughput import peak_memory, throughput
from megadpo.objectives.evaluate import evaluate
from megadpo.objectives.statistics import pair_statistics
from megadpo.objectives.terms import normalisers_of
from megadpo.output import write_config
from megadpo.platform.device import compute_device
from megadpo.platform.world import joined_world, rank
from megadpo.prepare import Plan, data_packing, prepare

if TYPE_CHECKING:
    from megadpo.reference import Reference

# What needs Megatron is imported inside the joined world, which has prepared it for this machine by then.

Metrics = dict[str, float]


@dataclass(frozen=True)
class Callbacks:
    """Functions called on rank 0 while training; all optional.

    Attributes:
        on_step_end: (step, metrics) after every optimizer step; steps count from 1.
        on_evaluation: (step, metrics) after every evaluation.
        on_save: (step, directory) after a checkpoint is written.
    """

    on_step_end: Callable[[int, Metrics], None] | None = None
    on_evaluation: Callable[[int, Metrics], None] | None = None
    on_save: Callable[[int, Path], None] | None = None


@dataclass(frozen=True)
class Result:
    """What training gives back, on every rank.

    Attributes:
        metrics: of the last step, and of the last evaluation under names that begin with "eval_".
        steps: optimizer steps of the whole run.
        model_path: the exported Hugging Face directory.
        output_dir: the run's directory.
    """

    metrics: Metrics
    steps: int
    model_path: Path
    output_dir: Path


@dataclass
class Run:
    """A run under way on this rank."""

    plan: Plan
    engine: Any
    reference: Reference
    eval_reference: Reference | None
    callbacks: Callbacks
    sinks: list[Sink] = field(default_factory=list)
    num_tokens_seen: int = 0


def run_training(config: Config, callbacks: Callbacks | None = None) -> Result:
    """The whole of training; see the head of this file.

    Raises:
        UserError: whatever cannot work, in one sentence, before anything is written.
    """
    plan = prepare(config)
    say_plan(plan)
    with joined_world(plan.layout, plan.config.train.seed):
        run = build(plan, callbacks or Callbacks())
        try:
            metrics = training_loop(run)
        finally:
            for sink in run.sinks:
                sink.close()
        model_path = export(run)
    return Result(metrics, plan.num_steps, model_path, plan.output_dir)


def build(plan: Plan, callbacks: Callbacks) -> Run:
    """Models, reference and engine on this rank; resumed where there is a checkpoint."""
    from megadpo.model.build import build_stage, load_weights
    from megadpo.parallel.megatron import MegatronEngine

    # A precomputed reference comes and goes before the policy takes its memory.
    reference, eval_reference = build_reference(plan)
    stage = build_stage(plan.policy.config, plan.layout, plan.dtype, plan.config.train.recompute)
    load_weights(stage, plan.policy.source)
    return Run(plan, MegatronEngine(stage, plan.config.train), reference, eval_reference, callbacks)


def build_reference(plan: Plan) -> tuple[Reference, Reference | None]:
    """The reference for the training pairs and for the held-out ones."""
    from megadpo import reference as references

    def frozen() -> Any:
        return references.frozen_stage(plan.reference.config, plan.layout, plan.dtype, plan.reference.source)

    mode, ld_alpha = plan.config.reference.mode, plan.config.objective.ld_alpha
    if mode == "none":
        return references.absent, references.absent
    if mode == "resident":
        resident = references.resident(frozen(), ld_alpha)
        return resident, resident
    train = precomputed_reference(plan, plan.train, frozen)
    return train, None if plan.eval is None else precomputed_reference(plan, plan.eval, frozen)


def precomputed_reference(plan: Plan, packing: Packing, frozen: Callable[[], Any]) -> Reference:
    """Reference log-probs of a data set, from the cache or computed now in larger micro-batches."""
    from megadpo import reference as references

    config = plan.config
    capacity = config.reference.tokens_per_micro_batch or config.train.tokens_per_micro_batch
    larger = data_packing(
        config,
        packing.groups,
        plan.layout,
        plan.reference.config.hidden_size,
        capacity,
        "reference.tokens_per_micro_batch",
    )
    weights, ld_alpha = references.weights_digest(Path(plan.reference.path)), config.objective.ld_alpha
    key = references.cache_key(weights, packing.groups.digest, plan.dtype, ld_alpha)
    logps_GK, from_cache = references.cached_logps(cache_root(config.data.cache_dir), key, larger, frozen, ld_alpha)
    say(f"reference log-probs of {len(packing.groups):,} pairs {'read from the cache' if from_cache else 'computed'}")
    return references.precomputed(logps_GK)


def training_loop(run: Run) -> Metrics:
    """Steps, evaluations and checkpoints until the last step; the last metrics."""
    from megadpo.state import resume, save

    plan, config = run.plan, run.plan.config
    first_step = resume(run) if plan.resume else 0
    if rank() == 0:
        write_config(plan.output_dir, config)
        run.sinks = open_sinks(plan.output_dir, config.logging, plan.num_steps, first_step or None)
    metrics: Metrics = {}
    for step in range(first_step, plan.num_steps):
        record = training_step(run, step)
        done = step + 1
        is_last = done == plan.num_steps
        if plan.eval is not None and (is_last or (config.eval.every and done % config.eval.every == 0)):
            held_out = evaluation(run)
            record |= held_out
            call(run.callbacks.on_evaluation, done, held_out)
        if is_last or "eval_loss" in record or done % config.logging.every == 0:
            for sink in run.sinks:
                sink.write(record)
        call(run.callbacks.on_step_end, done, record)
        if config.checkpoint.every and (is_last or done % config.checkpoint.every == 0):
            directory = save(run, done)
            call(run.callbacks.on_save, done, directory)
        metrics |= record
    return metrics


def training_step(run: Run, step: int) -> Metrics:
    """One optimizer step on one global batch; its metrics, the same on every rank."""
    plan, started = run.plan, time.perf_counter()
    numbers = plan.batches.at(step)
    micro_batches = rank_micro_batches(plan.train, numbers)
    reference_logps = run.reference(micro_batches)
    objective, terms = plan.config.objective, plan.config.objective.terms
    totals = collect.empty_vector(compute_device(), terms)
    normalisers = normalisers_of(plan.train.groups, numbers)

    def response_gradient(number: int, sums_RS: Tensor) -> Tensor:
        statistics = pair_statistics(sums_RS, reference_logps[number], micro_batches[number])
        evaluated = evaluate(statistics, normalisers, objective)
        totals.add_(collect.sum_vector(statistics, evaluated.losses_P, evaluated.rewards_R, evaluated.several_terms))
        return evaluated.gradient_RD

    run.engine.forward_backward(micro_batches, response_gradient, objective.ld_alpha)
    run.engine.finish_gradients()
    learning_rate = learning_rate_at(step, plan.num_steps, plan.config.train)
    try:
        grad_norm = run.engine.step(learning_rate)
    except ArithmeticError as error:
        raise UserError(
            f"step {step + 1}: {error}, so nothing was updated; lower train.learning_rate, or look for broken weights"
        ) from error
    metrics = reduce_metrics(totals, terms)
    num_tokens = int(plan.train.num_tokens_G[numbers].sum())
    run.num_tokens_seen += num_tokens
    return {
        "step": step + 1,
        **metrics,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "epoch": (step + 1) * plan.config.train.pairs_per_step / plan.batches.samples_per_epoch,
        "num_tokens": run.num_tokens_seen,
        **throughput(time.perf_counter() - started, num_tokens, len(numbers)),
        **peak_memory(compute_device()),
    }


def evaluation(run: Run) -> Metrics:
    """Loss and rewards on the held-out pairs, under names that begin with "eval_"; the same on every rank."""
    plan = run.plan
    assert plan.eval is not None and run.eval_reference is not None
    objective, terms = plan.config.objective, plan.config.objective.terms
    totals = collect.empty_vector(compute_device(), terms)
    normalisers = normalisers_of(plan.eval.groups, range(len(plan.eval.groups)))
    started = time.perf_counter()
    for start in range(0, len(plan.eval.groups), plan.config.train.pairs_per_step):
        numbers = range(start, min(start + plan.config.train.pairs_per_step, len(plan.eval.groups)))
        micro_batches = rank_micro_batches(plan.eval, list(numbers))
        reference_logps = run.eval_reference(micro_batches)
        for number, sums_RS in enumerate(run.engine.forward(micro_batches, objective.ld_alpha)):
            statistics = pair_statistics(sums_RS, reference_logps[number], micro_batches[number])
            evaluated = evaluate(statistics, normalisers, objective)
            totals += collect.sum_vector(statistics, evaluated.losses_P, evaluated.rewards_R, evaluated.several_terms)
    return reduce_metrics(totals, terms, "eval_") | {"eval_seconds": time.perf_counter() - started}


def rank_micro_batches(packing: Packing, numbers: Any) -> list[MicroBatch]:
    """This rank's micro-batches of the groups `numbers`, on its device."""
    from megatron.core import parallel_state

    device = compute_device()
    return [mb.to(device) for mb in packing.micro_batches(numbers, parallel_state.get_data_parallel_rank())]


def reduce_metrics(totals: Tensor, terms: Sequence[str], prefix: str = "") -> Metrics:
    """Metrics of the whole world from each rank's sums: only last stages have any, and of their tensor ranks one counts."""
    from megatron.core import parallel_state

    if parallel_state.get_tensor_model_parallel_rank() != 0:
        totals.zero_()
    dist.all_reduce(totals)
    return collect.reduce(collect.from_vector(totals, terms), prefix)


def export(run: Run) -> Path:
    """Write the policy as a Hugging Face directory; collective."""
    from megadpo.state import export_policy

    directory = export_policy(run)
    say(f"trained model: {directory}")
    return directory


def call(callback: Callable[..., None] | None, *arguments: Any) -> None:
    """Call a user's callback on rank 0."""
    if callback is not None and rank() == 0:
        callback(*arguments)


def say(sentence: str) -> None:
    """A line for the user, once."""
    if rank() == 0:
        print(f"megadpo: {sentence}", file=sys.stderr, flush=True)


def say_plan(plan: Plan) -> None:
    """What is about to run: data, layout, device, dtype."""
    for which, report in plan.reports.items():
        say(f"{which}: {report.sentence()}")
    for name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"):
        if getattr(plan.policy.config, name, 0.0):
            say(f"the model's {name} {getattr(plan.policy.config, name)} is not used: training runs with dropout 0")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    say(f"{plan.num_steps} steps of {plan.config.train.pairs_per_step} pairs, {plan.layout}, {plan.dtype} on {device}")
    if plan.resume:
        say(f"resuming from {plan.resume}")
