"""Training, from a configuration to a Hugging Face directory: the story on one page.

prepare  rows -> token ids -> groups, layout and model checked, all before processes are joined (setup.py)
build    this rank's stage of the policy, the reference (reference.py), the engine
loop     a global batch a step, packed on a thread while the step before it computes (`Run` in run.py, global_batch.py);
         log-probs -> objective -> gradients -> update (step.py); metrics, evaluation, checkpoint (run_state.py)
export   the trained model as a Hugging Face directory
"""

from __future__ import annotations

import functools
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megadpo.config.schema import Config
from megadpo.console.activity import activity, counted_through
from megadpo.console.heartbeat import speaking
from megadpo.data.rows.report import counted
from megadpo.launch.signals import WORDS, Stopped, noting
from megadpo.launch.worker import FAILURE_FILE
from megadpo.metrics import collect
from megadpo.metrics.lengths import answer_lengths
from megadpo.metrics.sinks import open_sinks
from megadpo.model.activations import Activations
from megadpo.model.attention.backends import slow_on
from megadpo.model.by_name import first_match
from megadpo.objectives.terms import normalisers_of
from megadpo.parallel.agreement import problem_of
from megadpo.parallel.world import joined_world, rank, seed_step
from megadpo.platform.device import compute_device
from megadpo.platform.step_clock import part
from megadpo.secrets.redact import redacted
from megadpo.training.console import log, log_adapter, log_origin, log_setup
from megadpo.training.decomposition import begin_with_parts
from megadpo.training.hub import pushed
from megadpo.training.inputs import quantization_text
from megadpo.training.lr_schedule import learning_rate_at
from megadpo.training.output_dir import owned_output_dir, remove_leftovers, write_config
from megadpo.training.resume import settle_checkpoint
from megadpo.training.run import Callbacks, Metrics, Result, Run, call
from megadpo.training.run_record import recorded
from megadpo.training.setup import RunSetup, prepare
from megadpo.training.spike_record import begin_spikes
from megadpo.training.stop import Stopping, deadline_of
from megadpo.training.summary import tell_end
from megadpo.training.watchdog import watched

if TYPE_CHECKING:
    from megadpo.engine.base import Engine
    from megadpo.model.build import Stage
    from megadpo.pipeline.interleaved_reference import InterleavedReference

# What needs Megatron is imported inside the joined world, which has prepared it for this machine by then.


def run_training(config: Config, callbacks: Callbacks | None = None) -> Result:
    """The whole of training; see the head of this file.

    Raises:
        UserError: whatever cannot work, in one sentence, before anything but the lock is written; a spike; what is not
            finite.
        Stopped: a signal or the deadline came before the last step; the state is saved.
        KeyboardInterrupt: SIGINT came before the first step, or for the second time.
    """
    callbacks = Callbacks.checked(callbacks)
    began = time.time()
    config.require_for_training()
    with speaking(), noting(announce) as request, owned_output_dir(Path(config.output_dir), rank() == 0) as lock:
        setup = prepare(config)
        stopping = Stopping(request)
        if rank() == 0:
            num_parameters = sum(math.prod(shape) for shape in setup.trained_shapes.values())
            stopping.deadline = deadline_of(config.checkpoint.before_deadline, began, num_parameters)
        log_setup(setup)
        with (
            joined_world(setup.layout, setup.config.train.seed),
            watched(setup.config.train.hang_timeout, setup.output_dir) as progress,
            recorded() as record,
        ):
            with activity("verifying the checkpoint"):
                setup = replace(setup, origin=settle_checkpoint(setup.search, setup.origin))
            log_origin(setup)
            if rank() == 0:  # every rank has looked at what was there before, and nothing else is written yet
                write_config(setup.output_dir, setup.config)
            record.begin(setup)
            setup = begin_with_parts(setup)
            with activity("building the model"):
                run = build(setup, callbacks)
            run.stopping, run.lock, run.progress, run.record = stopping, lock, progress, record
            if stopping.deadline is not None:
                stopping.deadline.saves = run.saver.times
            try:
                metrics = training_loop(run)
            except BaseException as error:
                has_failed = not isinstance(error, Stopped)
                if has_failed:  # at once: where another rank has failed, our launcher soon kills this one
                    record.end_by(error)
                run.close(has_failed=has_failed, at_once=isinstance(error, KeyboardInterrupt))
                raise
            run.close()
            model_path = export(run)
    tell_end(setup, run.record.first_step, time.time() - began, metrics)
    return Result(metrics, setup.num_steps, model_path, setup.output_dir, pushed(setup.config, model_path))


def announce(number: signal.Signals) -> None:
    """Say that a signal was heard; called in its handler. Our launcher has said it already."""
    if rank() == 0 and FAILURE_FILE not in os.environ:
        more = "; once more ends it at once" if number == signal.SIGINT else ""
        os.write(2, f"megadpo: {number.name}: the run ends once its step is done and saved{more}\n".encode())


def build(setup: RunSetup, callbacks: Callbacks) -> Run:
    """Models, reference and engine on this rank; resumed where there is a checkpoint."""
    from megadpo.model.four_bit.linear import bytes_in_four_bits
    from megadpo.model.heads.kernels import choose_kernels
    from megadpo.model.heads.logprob import TOKEN_STATISTICS
    from megadpo.training.reference import build_references

    kernels = choose_kernels(setup.config.model.kernels, compute_device())
    policy = functools.cache(lambda: build_policy(setup))
    # A precomputed reference comes and goes before the policy takes its memory.
    references = build_references(setup, policy)
    engine = build_engine(setup, policy(), references.train.interleaved)
    policy.cache_clear()
    statistics = [name for name in TOKEN_STATISTICS if name != "log_square" or setup.config.objective.wpo]
    engine.stage.configure_head(statistics)
    stage = engine.stage
    described = engine.describe() | {
        "layers": stage.layers,
        "attention": stage.attention,
        "small operations": stage.small_ops,
        "activations": stage.activations,
    }
    if setup.config.model.quantization != "none":
        held = f"{bytes_in_four_bits(stage.models) / 2**20:,.1f} MiB on rank 0"
        described["frozen weights"] = f"{quantization_text(setup.config.model)} ({held})"
    if not setup.objective.has_reward_head:
        described["log-prob head"] = kernels
    if setup.adapter is not None:
        log_adapter(setup, setup.adapter.spec)
    log(", ".join(f"{what} {name}" for what, name in described.items()))
    warning = slow_on(compute_device().type, engine.stage.attention)
    if warning is not None:
        log(warning)
    return Run(setup, engine, references, callbacks)


def build_policy(setup: RunSetup) -> Stage:
    """This rank's stage of the policy, loaded, with the adapters that are trained."""
    from megadpo.model.adapters.attach import begin_magnitudes
    from megadpo.model.build import build_stage
    from megadpo.model.freezing import freeze
    from megadpo.model.neftune import EmbeddingNoise
    from megadpo.model.weights import load_weights

    config, shape, source = setup.config, setup.policy.shape, setup.frozen
    activations = Activations.of(config.train)
    spec, trained = (None, None) if setup.adapter is None else (setup.adapter.spec, setup.adapter.source)
    if config.parallel.engine == "deepspeed":
        from megadpo.engine.deepspeed.engine import policy_stage

        of_engine = config.parallel, config.model, spec, trained
        stage = policy_stage(shape, source, setup.layout, setup.dtype, activations, *of_engine)
    else:
        stage = build_stage(shape, setup.layout, setup.dtype, activations, options=config.model, adapter=spec)
        load_weights(stage, source, trained)
    if setup.adapter is not None and setup.adapter.is_new and setup.adapter.spec.use_dora:
        begin_magnitudes(stage.models)
    if config.train.neftune_alpha is not None:
        EmbeddingNoise(config.train.neftune_alpha, config.train.seed).attach(stage)
    if config.train.freeze:
        freeze(stage, lambda name: first_match(config.train.freeze, name) is not None)
    return stage


def build_engine(setup: RunSetup, stage: Stage, interleaved: InterleavedReference | None) -> Engine:
    """The engine that `parallel.engine` names, of the policy's stage, with the schedule that `schedule.name` does."""
    from megadpo.pipeline.select import pipeline_schedule

    schedule = pipeline_schedule(setup.config.schedule, interleaved)
    if setup.config.parallel.engine == "deepspeed":
        from megadpo.engine.deepspeed.engine import ZeroEngine

        return ZeroEngine(stage, setup.config.train, setup.config.parallel, schedule)
    from megadpo.engine.megatron import MegatronEngine

    return MegatronEngine(stage, setup.config.train, setup.config.parallel, schedule)


def training_loop(run: Run) -> Metrics:
    """Steps, evaluations and checkpoints until the last step; the last metrics (of a finished run, those it ended with).

    Raises:
        Stopped: the ranks have agreed to stop.
    """
    from megadpo.training.run_state import resume, set_aside_later
    from megadpo.training.stalls import StallWatch

    setup, config = run.setup, run.setup.config
    first_step = resume(run) if setup.resume else 0
    if rank() == 0:
        root = setup.output_dir / "checkpoints"
        is_own = setup.resume is not None and setup.resume.resolve().parent == root.resolve()
        # What did not come of this beginning is another way's.
        set_aside_later(root, first_step if is_own else 0)
        for path in remove_leftovers(setup.output_dir):
            log(f"removed {path}, which a run that was killed had left")
        if is_own and (problem := problem_of(lambda: run.saver.remove_oldest(first_step))) is not None:
            log(f"warning: an old checkpoint stays: {problem}")
        known = setup.num_steps, first_step or None, is_own, redacted(config.to_dict()), log
        run.sinks = open_sinks(setup.output_dir, config.logging, *known)
        if first_step == setup.num_steps:
            log(f"nothing is left to train: all {counted(first_step, 'step')} are done; only the model is exported again")
        begin_spikes(setup.output_dir, (first_step or None) if is_own else None)
    run.record.resumed_at(first_step)
    stalls = StallWatch(run.engine.stage, first_step, setup.num_steps, log)
    run.stopping.request.is_deferred = True  # from here on there is a state to save
    if run.evaluation_due and setup.eval is not None:
        make_up_for_evaluation(run, first_step)
    for step in range(first_step, setup.num_steps):
        run.progress.begin("first step" if step == first_step else f"step {step + 1}")
        run.profile.before(step + 1)
        record = training_step(run, step)
        run.progress.begin("between steps")
        run.stopping.step_took(record["step_seconds"])
        done = run.record.last_step = step + 1
        stalls.look(done, record["grad_norm"], record["learning_rate"])
        is_last = done == setup.num_steps
        run.profile.after(done, is_last)
        if reference_moves_after(config, step):
            run.engine.wait_for_parameters()
            run.references.move(run.engine.stage, config.reference.mixup_alpha)
        if setup.eval is not None and (is_last or (config.eval.every and done % config.eval.every == 0)):
            held_out = evaluation(run)
            record |= held_out
            if held_out:
                call(run.callbacks.on_evaluation, done, held_out)
        if is_last or "eval_loss" in record or done % config.logging.every == 0:
            run.write(record)
        run.metrics |= record
        call(run.callbacks.on_step_end, done, record)
        is_saved = save_where_due(run, done, is_last)
        if run.stopping.agreed is not None and (is_saved or not is_last):
            raise stopped(run, done, is_saved)
        run.saver.report()
    run.saver.finish()
    if run.evaluation_due:
        log("warning: the last evaluation was left out, for the run was told to stop")
    return run.metrics


def save_where_due(run: Run, done: int, is_last: bool) -> bool:
    """Save after every so many steps and at the run's end, whichever end that is; whether it was saved. Collective."""
    from megadpo.training.run_state import save

    options, ends = run.setup.config.checkpoint, is_last or run.stopping.agreed is not None
    if not (options.every and done % options.every == 0) and not (options.at_end and ends):
        return False
    run.check_owner()
    run.progress.begin("saving")
    save(run, done)
    if ends:
        run.saver.finish()
    run.stopping.agree()  # a save may be long: no further step, and no second save, for a signal that came during it
    if run.stopping.agreed is not None:
        run.saver.finish()
    return run.saver.last_step == done or run.stopping.agreed is None


def stopped(run: Run, done: int, is_saved: bool) -> Stopped:
    """What ends a run before its last step, told to the user."""
    status, num_steps = run.stopping.agreed, run.setup.num_steps
    assert status is not None
    why = "its save failed" if run.setup.config.checkpoint.at_end else "checkpoint.at_end is false"
    what = "saved, and the same command goes on from there" if is_saved else f"not saved ({why})"
    log(f"{WORDS[status]} after step {done} of {num_steps}: {what}")
    return Stopped(status, is_told=True)


def training_step(run: Run, step: int) -> Metrics:
    """One optimizer step on one global batch; its metrics, the same on every rank but for what a rank measures of
    itself: times and what is counted a second, memory, and `mfu`, which only rank 0 has.

    Raises:
        UserError: a spike, as `train.on_spike` says.
    """
    from megadpo.training.spike_policy import accept_or_leave_out
    from megadpo.training.step import StepResult, optimizer_step, reduce_metrics

    setup, started = run.setup, time.perf_counter()
    learning_rate = learning_rate_at(step, setup.num_steps, setup.config.train)
    following = None if reference_waits_after(setup, step) else run.batches.get_next
    metrics: Metrics = {}
    is_updated, has_live_reference = True, run.references.train.stage is not None
    if setup.adapter is not None and setup.adapter.spec.dropout:
        seed_step(setup.config.train.seed, step)
    if run.engine.stage.noise is not None:
        run.engine.stage.noise.step = step

    def accepts(result: StepResult) -> bool:
        """Between gradients and update: whether the loss and the gradient norm, of all ranks, are such as to be learned."""
        nonlocal is_updated
        with part("communication"):
            metrics.update(reduce_metrics(result.metric_sums, setup.objective, stopping=run.stopping))
        run.figures.compare_ranks()
        is_updated = accept_or_leave_out(run, step + 1, metrics["loss"], result)
        return is_updated

    with run.figures.step():
        batch = run.batches.get(step)
        run.take(batch)
        result = optimizer_step(
            run.engine,
            run.references.train,
            batch,
            setup.objective,
            run.running_mean,
            learning_rate,
            following,
            accepts=accepts,
        )
    step_seconds = time.perf_counter() - started
    if is_updated:
        run.running_mean = result.running_mean
    assert batch.packing is not None
    num_tokens = int(batch.packing.num_tokens_G[batch.group_ids].sum())
    run.num_tokens_seen += num_tokens
    return {
        "step": step + 1,
        **metrics,
        **answer_lengths(run.groups, batch.group_ids),
        **run.engine.router_metrics(),
        "grad_norm": result.grad_norm,
        "learning_rate": learning_rate,
        **({"num_left_out": run.spikes.num_left_out} if setup.config.train.on_spike == "skip" else {}),
        "epoch": run.feed.epoch(step, batch.position),
        "num_tokens": run.num_tokens_seen,
        **run.figures.metrics(step_seconds, run.groups, batch.group_ids, num_tokens, has_live_reference),
        "data_wait_seconds": run.batches.seconds_waited,
        "time": time.time(),
    }


def reference_moves_after(config: Config, step: int) -> bool:
    """Whether the reference moves towards the policy between this step and the next."""
    every = config.reference.sync_every
    return every is not None and (step + 1) % every == 0


def reference_waits_after(setup: RunSetup, step: int) -> bool:
    """Whether nothing of the next step can be run ahead: there is none, or its reference is another one."""
    return step + 1 == setup.num_steps or reference_moves_after(setup.config, step)


def make_up_for_evaluation(run: Run, step: int) -> None:
    """The evaluation after `step` that was left out when the run was stopped, as a record of its own."""
    held_out = evaluation(run)
    if not held_out:
        raise stopped(run, step, is_saved=True)
    run.metrics |= held_out
    run.write({"step": step, **held_out, "time": time.time()})
    call(run.callbacks.on_evaluation, step, held_out)


def evaluation(run: Run) -> Metrics:
    """Loss and rewards on the held-out groups, under names that begin with "eval_"; the same on every rank.

    Nothing where the run is to stop: then it is due when the run goes on.
    """
    from megadpo.training.global_batch import pack_global_batch
    from megadpo.training.step import evaluate_batch, reduce_metrics

    run.progress.begin("evaluating")
    setup, objective, started = run.setup, run.setup.objective, time.perf_counter()
    assert setup.eval is not None and run.references.eval is not None
    num_groups, at_once = len(setup.eval.groups), setup.config.train.pairs_per_step
    normalisers = normalisers_of(setup.eval.groups, range(num_groups))
    metric_sums = collect.empty_vector(compute_device(), objective)
    num_batches = -(-num_groups // at_once)
    for start in counted_through(range(0, num_groups, at_once), "evaluating", num_batches, "batches"):
        group_ids = np.arange(start, min(start + at_once, num_groups))
        if run.stopping.agreed is not None or run.stopping.agree():
            run.evaluation_due = True
            return {}
        batch = pack_global_batch(setup.eval, group_ids, objective, normalisers)
        metric_sums += evaluate_batch(run.engine, run.references.eval, batch, objective, run.running_mean)
    run.evaluation_due = False
    return reduce_metrics(metric_sums, objective, "eval_") | {"eval_seconds": time.perf_counter() - started}


def export(run: Run) -> Path:
    """Write the policy as a Hugging Face directory; collective."""
    from megadpo.training.run_state import export_policy

    run.progress.begin("exporting")
    with activity("exporting the trained model"):
        directory = export_policy(run)
    log(f"trained model: {directory}")
    return directory
