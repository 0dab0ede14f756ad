"""Training, from a configuration to a Hugging Face directory: the story on one page.

prepare  rows -> groups -> tokens, layout and model checked, all before processes are joined
build    this rank's stage of the policy, the reference, the engine
loop     batch -> micro-batches -> log-probs -> objective -> gradients -> step -> metrics, evaluation, checkpoint
export   the trained model as a Hugging Face directory
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megadpo.config.schema import Config, ObjectiveConfig
from megadpo.data.batches.bin_packing import IntArray
from megadpo.data.batches.prefetch import Prefetcher
from megadpo.data.rows.report import DataReport, counted
from megadpo.errors import UserError
from megadpo.metrics import collect
from megadpo.metrics.sinks import Sink, open_sinks
from megadpo.metrics.throughput import peak_memory, throughput
from megadpo.model.activations import KEEP, Activations
from megadpo.objectives.coupled import RunningMean
from megadpo.objectives.specs import has_reward_head
from megadpo.objectives.terms import normalisers_of
from megadpo.parallel.world import joined_world, rank
from megadpo.platform.device import compute_device
from megadpo.training.lr_schedule import learning_rate_at
from megadpo.training.output_dir import write_config
from megadpo.training.setup import RunSetup, prepare

if TYPE_CHECKING:
    from megadpo.engine.base import Engine
    from megadpo.pipeline.interleaved_reference import InterleavedReference
    from megadpo.training.global_batch import Streams
    from megadpo.training.reference import References

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
    """A run under way on this rank.

    Attributes:
        ahead: the groups of a step and their micro-batches, made ready while the step before it computes.
    """

    plan: RunSetup
    engine: Engine
    references: References
    callbacks: Callbacks
    sinks: list[Sink] = field(default_factory=list)
    delta: RunningMean = field(default_factory=RunningMean)
    num_tokens_seen: int = 0
    metrics: Metrics = field(default_factory=dict)
    ahead: Prefetcher[tuple[IntArray, Streams]] = field(init=False)

    def __post_init__(self) -> None:
        from megadpo.training.global_batch import streams_of

        plan, objective = self.plan, self.plan.config.objective

        def read(step: int) -> tuple[IntArray, Streams]:
            numbers = plan.batches.group_ids(step)
            return numbers, streams_of(plan.train, numbers, objective)

        self.ahead = Prefetcher(read, plan.num_steps)

    def close(self) -> None:
        """Ends what works beside the steps, and writes what was not written yet."""
        self.ahead.close()
        self.references.write()
        for sink in self.sinks:
            sink.close()

    def say(self, sentence: str) -> None:
        """A line for the user, once."""
        say(sentence)


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
            run.close()
        model_path = export(run)
    return Result(metrics, plan.num_steps, model_path, plan.output_dir)


def build(plan: RunSetup, callbacks: Callbacks) -> Run:
    """Models, reference and engine on this rank; resumed where there is a checkpoint."""
    from megadpo.model.heads.kernels import choose_kernels
    from megadpo.model.heads.logprob import TOKEN_STATISTICS
    from megadpo.training.reference import build_references

    kernels = choose_kernels(plan.config.model.kernels, compute_device())
    # A precomputed reference comes and goes before the policy takes its memory.
    references = build_references(plan, say)
    engine = build_engine(plan, references.interleaved)
    statistics = [name for name in TOKEN_STATISTICS if name != "log_square" or plan.config.objective.wpo]
    engine.stage.configure_head(statistics)
    described = engine.describe() | {"layers": engine.stage.layers, "attention": engine.stage.attention}
    if not has_reward_head(plan.config.objective.loss_types):
        described["log-prob head"] = kernels
    say(", ".join(f"{what} {name}" for what, name in described.items()))
    return Run(plan, engine, references, callbacks)


def build_engine(plan: RunSetup, interleaved: InterleavedReference | None) -> Engine:
    """The engine that `parallel.engine` names, with the policy loaded and the schedule that `schedule.name` does."""
    from megadpo.pipeline.select import pipeline_schedule

    schedule = pipeline_schedule(plan.config.schedule, interleaved)
    shape, layout, activations = plan.policy.shape, plan.layout, Activations.of(plan.config.train)
    options = plan.config.model
    if plan.config.parallel.engine == "deepspeed":
        from megadpo.engine.deepspeed.engine import ZeroEngine, policy_stage

        stage = policy_stage(shape, plan.policy.source, layout, plan.dtype, activations, plan.config.parallel, options)
        return ZeroEngine(stage, plan.config.train, plan.config.parallel, schedule)
    from megadpo.engine.megatron import MegatronEngine
    from megadpo.model.build import build_stage
    from megadpo.model.weights import load_weights

    stage = build_stage(shape, layout, plan.dtype, activations, options=options)
    load_weights(stage, plan.policy.source)
    return MegatronEngine(stage, plan.config.train, plan.config.parallel, schedule)


def training_loop(run: Run) -> Metrics:
    """Steps, evaluations and checkpoints until the last step; the last metrics (of a finished run, those it ended with)."""
    from megadpo.training.run_state import resume, save, set_aside_later

    plan, config = run.plan, run.plan.config
    first_step = resume(run) if plan.resume else 0
    if rank() == 0:
        set_aside_later(plan.output_dir / "checkpoints", first_step)
        write_config(plan.output_dir, config)
        run.sinks = open_sinks(plan.output_dir, config.logging, plan.num_steps, first_step or None)
    for step in range(first_step, plan.num_steps):
        record = training_step(run, step)
        done = step + 1
        is_last = done == plan.num_steps
        if reference_moves_after(config, step):
            run.engine.wait_for_parameters()
            run.references.move(run.engine.stage, config.reference.mixup_alpha)
        if plan.eval is not None and (is_last or (config.eval.every and done % config.eval.every == 0)):
            held_out = evaluation(run)
            record |= held_out
            call(run.callbacks.on_evaluation, done, held_out)
        if is_last or "eval_loss" in record or done % config.logging.every == 0:
            for sink in run.sinks:
                sink.write(record)
        run.metrics |= record
        call(run.callbacks.on_step_end, done, record)
        if config.checkpoint.every and (is_last or done % config.checkpoint.every == 0):
            directory = save(run, done)
            call(run.callbacks.on_save, done, directory)
    return run.metrics


def training_step(run: Run, step: int) -> Metrics:
    """One optimizer step on one global batch; its metrics, the same on every rank."""
    from megadpo.parallel.context import on_device
    from megadpo.training.global_batch import global_batch, response_gradient

    plan, objective, started = run.plan, run.plan.config.objective, time.perf_counter()
    numbers, streams = run.ahead.get(step)
    normalisers = normalisers_of(plan.train.groups, numbers)
    reference, interleaved = run.references.train_for(numbers), run.references.interleaved
    batch = global_batch(
        run.engine, plan.train, reference, numbers, normalisers, objective, run.delta.add, streams, interleaved
    )
    if interleaved is not None and not reference_waits_after(plan, step):
        interleaved.run_ahead(on_device(run.ahead.get_next()[1].micro_batches))
    run.engine.forward_backward(batch.micro_batches, response_gradient(batch, run.engine), objective.ld_alpha)
    run.engine.finish_gradients()
    learning_rate = learning_rate_at(step, plan.num_steps, plan.config.train)
    try:
        grad_norm = run.engine.step(learning_rate)
    except ArithmeticError as error:
        raise UserError(
            f"step {step + 1}: {error}, so nothing was updated; lower train.learning_rate, or look for broken weights"
        ) from error
    run.references.remember(numbers, batch.micro_batches, batch.reference_logps)
    num_tokens = int(plan.train.num_tokens_G[numbers].sum())
    run.num_tokens_seen += num_tokens
    return {
        "step": step + 1,
        **reduce_metrics(batch.totals, objective),
        **run.engine.router_metrics(),
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "epoch": (step + 1) * plan.config.train.pairs_per_step / plan.batches.samples_per_epoch,
        "num_tokens": run.num_tokens_seen,
        **throughput(time.perf_counter() - started, num_tokens, len(numbers)),
        "data_wait_seconds": run.ahead.seconds_waited,
        **peak_memory(compute_device()),
    }


def reference_moves_after(config: Config, step: int) -> bool:
    """Whether the reference moves towards the policy between this step and the next."""
    every = config.reference.sync_every
    return every is not None and (step + 1) % every == 0


def reference_waits_after(plan: RunSetup, step: int) -> bool:
    """Whether nothing of the next step can be run ahead: there is none, or its reference is another one."""
    return step + 1 == plan.num_steps or reference_moves_after(plan.config, step)


def evaluation(run: Run) -> Metrics:
    """Loss and rewards on the held-out pairs, under names that begin with "eval_"; the same on every rank."""
    from megadpo.training.global_batch import evaluate_batch, global_batch

    plan = run.plan
    assert plan.eval is not None and run.references.eval is not None
    started, num_groups, objective = time.perf_counter(), len(plan.eval.groups), plan.config.objective
    totals = collect.empty_vector(compute_device(), objective)
    normalisers = normalisers_of(plan.eval.groups, range(num_groups))
    for start in range(0, num_groups, plan.config.train.pairs_per_step):
        numbers = np.arange(start, min(start + plan.config.train.pairs_per_step, num_groups))
        batch = global_batch(
            run.engine, plan.eval, run.references.eval, numbers, normalisers, objective, lambda reward: run.delta.mean
        )
        evaluate_batch(batch, run.engine.forward(batch.micro_batches, objective.ld_alpha))
        totals += batch.totals
    return reduce_metrics(totals, objective, "eval_") | {"eval_seconds": time.perf_counter() - started}


def reduce_metrics(totals: Tensor, options: ObjectiveConfig, prefix: str = "") -> Metrics:
    """Metrics of the whole world from the sums of last stages, of whose tensor and context ranks one counts."""
    from megadpo.parallel.context import is_first_rank_of_stage

    if not is_first_rank_of_stage():
        totals.zero_()
    dist.all_reduce(totals)
    return collect.reduce(totals, options, prefix)


def export(run: Run) -> Path:
    """Write the policy as a Hugging Face directory; collective."""
    from megadpo.training.run_state import export_policy

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


def say_plan(plan: RunSetup) -> None:
    """What is about to run: data, layout, device, dtype."""
    for which, report in plan.reports.items():
        say(f"{which}: {report.sentence()}")
    if plan.reports["train"].kind == "labels":
        say_balance(plan.config.objective, plan.reports["train"])
    for name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"):
        if getattr(plan.policy.config, name, 0.0):
            say(f"the model's {name} {getattr(plan.policy.config, name)} is not used: training runs with dropout 0")
    experts = plan.policy.shape.experts
    if experts is not None and plan.config.train.router_aux_coef == 0:
        say(f"{experts.count} experts: their load is measured (moe/…) and not balanced; train.router_aux_coef would do that")
    if plan.policy.has_new_head:
        say(f"{plan.policy.path} has no scalar head: it gets a new one, drawn from train.seed")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    noun = plan.reports["train"].noun
    steps, rows = counted(plan.num_steps, "step"), counted(plan.config.train.pairs_per_step, noun)
    say(f"{steps} of {rows}, {plan.layout}, {plan.dtype} on {device}")
    if (activations := Activations.of(plan.config.train)) != KEEP:
        say(f"activations: {activations}")
    if plan.config.train.warmup_steps >= plan.num_steps > 0 and plan.config.train.warmup_steps > 0:
        say(
            f"warning: train.warmup_steps {plan.config.train.warmup_steps} is not below this run's {steps}, "
            "so the learning rate hardly rises and the model hardly changes; lower it"
        )
    if len(plan.train.groups) < plan.config.train.pairs_per_step:
        say(
            f"warning: {counted(len(plan.train.groups), noun)} are fewer than train.pairs_per_step "
            f"{plan.config.train.pairs_per_step}: a step sees some of them several times; lower it"
        )
    if plan.eval is not None and len(plan.eval.groups) < plan.reports["eval"].num_kept:
        say(f"eval: {len(plan.eval.groups)} of them are used (eval.pairs)")
    if plan.resume:
        say(f"resuming from {plan.resume}")
    elif (plan.output_dir / "hf").is_dir():
        say(f"{plan.output_dir} holds this run without a checkpoint to resume from: starting over, hf/ will be replaced")


def say_balance(options: ObjectiveConfig, report: DataReport) -> None:
    """How desirable and undesirable answers weigh against each other; the advice is KTO's (arXiv:2402.01306, 4.2)."""
    undesirable = options.undesirable_weight * report.num_undesirable
    ratio = options.desirable_weight * report.num_desirable / undesirable if undesirable else math.inf
    advice = ""
    if not 0.99 <= ratio <= 1.34:
        least = undesirable / report.num_desirable
        advice = f"; KTO's authors advise 1 to 4/3, as objective.desirable_weight {least:.3g} to {least * 4 / 3:.3g} gives"
    say(f"desirable answers weigh {ratio:.3g} times what undesirable ones do{advice}")
