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

from megadpo.config.schema import Config
from megadpo.console.activity import activity
from megadpo.console.heartbeat import speaking, steady
from megadpo.data.rows.report import counted
from megadpo.launch.signals import Stopped, noting
from megadpo.launch.worker import FAILURE_FILE
from megadpo.metrics.lengths import answer_lengths
from megadpo.metrics.sinks import open_sinks
from megadpo.model.activations import Activations
from megadpo.model.attention.backends import slow_on
from megadpo.model.by_name import first_match
from megadpo.objectives.objective import Loss
from megadpo.parallel.agreement import from_all_ranks, problem_of
from megadpo.parallel.world import joined_world, rank, seed_step
from megadpo.platform.device import compute_device
from megadpo.platform.step_clock import part
from megadpo.secrets.redact import redacted
from megadpo.training.callbacks import RunInfo
from megadpo.training.console import log, log_adapter, log_origin, log_setup
from megadpo.training.decomposition import begin_with_parts
from megadpo.training.ending import save_where_due, stopped
from megadpo.training.feed import require_same_groups
from megadpo.training.inputs import quantization_text
from megadpo.training.lr_schedule import learning_rate_at
from megadpo.training.output_dir import owned_output_dir, remove_leftovers, write_config
from megadpo.training.pushing import pushed
from megadpo.training.resume import settle_checkpoint
from megadpo.training.run import Callbacks, Metrics, Result, Run, call
from megadpo.training.run_record import recorded
from megadpo.training.setup import RunSetup, prepare
from megadpo.training.spike_record import begin_spikes
from megadpo.training.stop import Stopping, deadline_of
from megadpo.training.summary import tell_end
from megadpo.training.watchdog import watched
from megadpo.validation.evaluation import best_of, check_best_metric

if TYPE_CHECKING:
    from megadpo.engine.base import Engine
    from megadpo.model.build import Stage
    from megadpo.pipeline.interleaved_reference import InterleavedReference

# What needs Megatron is imported inside the joined world, which has prepared it for this machine by then.


def run_training(config: Config, callbacks: Callbacks | None = None, objective: Loss | None = None) -> Result:
    """The whole of training; see the head of this file.

    Args:
        objective: the loss `custom`, in place of what `objective.module` names.

    Raises:
        UserError: whatever cannot work, in one sentence, before anything but the lock is written; a spike; what is not
            finite.
        Stopped: a signal or the deadline came before the last step; the state is saved.
        KeyboardInterrupt: SIGINT came before the first step, or for the second time.
    """
    callbacks = Callbacks.checked(callbacks)
    if callbacks.compute_metrics is None:
        check_best_metric(config)
    else:  # the first evaluation tells which names there are
        best_of(config)
    began = time.time()
    config.require_for_training()
    with speaking(), noting(announce) as request, owned_output_dir(Path(config.output_dir), rank() == 0) as lock:
        setup = prepare(config, objective)
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
                training_loop(run)
            except BaseException as error:
                has_failed = not isinstance(error, Stopped)
                if has_failed:  # at once: where another rank has failed, our launcher soon kills this one
                    record.end_by(error)
                run.close(has_failed=has_failed, at_once=isinstance(error, KeyboardInterrupt))
                raise
            run.close()
            result = export(run)
        tell_end(setup, run.record.first_step, time.time() - began, result)
        request.is_deferred = False  # a push may be broken off: nothing is lost by it
        return replace(result, pushed_to=pushed(setup, result.model_path))


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
    engine.routes = references.train.routes
    policy.cache_clear()
    statistics = [name for name in TOKEN_STATISTICS if name != "log_square" or setup.config.objective.wpo]
    engine.stage.configure_head(statistics)
    stage = engine.stage
    described = engine.describe() | {
        "layers": stage.layers,
        "attention": stage.attention,
        "small operations": stage.small_ops,
        "activations": stage.activations,
        **({} if stage.linear_attention is None else {"linear attention": stage.linear_attention}),
        **({} if stage.expert_products is None else {"experts' products": stage.expert_products}),
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
        EmbeddingNoise(config.train.neftune_alpha, config.train.seed).attach(stage, shape.embedding_module_multiplies)
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


def begin(run: Run) -> int:
    """Resume where there is a checkpoint, make the run's directory its own, open where metrics go; the steps done."""
    from megadpo.training.run_state import resume, set_aside_later

    setup, config = run.setup, run.setup.config
    first_step = resume(run) if setup.resume else 0
    run.record.resumed_at(first_step)
    run.heard = frozenset(from_all_ranks(run.callbacks.names())[0])
    if rank() != 0:
        return first_step
    root = setup.output_dir / "checkpoints"
    # What did not come of this beginning is another way's.
    set_aside_later(root, first_step if setup.resumes_own else 0)
    for path in remove_leftovers(setup.output_dir):
        log(f"removed {path}, which a run that was killed had left")
    if setup.resumes_own and (problem := problem_of(lambda: run.saver.remove_oldest(first_step))) is not None:
        log(f"warning: an old checkpoint stays: {problem}")
    known = setup.num_steps, first_step or None, setup.resumes_own, redacted(config.to_dict()), log
    run.sinks = open_sinks(setup.output_dir, config.logging, *known, held_out=list(setup.eval))
    if run.ended is not None:
        ended = f"the run has ended after step {first_step} of {setup.num_steps} ({run.ended.why})"
        log(f"nothing is left to train: {ended}; only the model is exported again")
    elif first_step == setup.num_steps:
        log(f"nothing is left to train: all {counted(first_step, 'step')} are done; only the model is exported again")
    begin_spikes(setup.output_dir, (first_step or None) if setup.resumes_own else None)
    return first_step


def training_loop(run: Run) -> Metrics:
    """Steps, evaluations and checkpoints until the last step; the last metrics (of a finished run, those it ended with).

    Raises:
        Stopped: the ranks have agreed to stop.
    """
    from megadpo.training.held_out import ask, evaluate_and_write, evaluation, take
    from megadpo.training.stalls import StallWatch

    setup, config = run.setup, run.setup.config
    first_step = begin(run)
    stalls = StallWatch(run.engine.stage, first_step, setup.num_steps, log)
    run.stopping.request.is_deferred = True  # from here on there is a state to save
    before_first_step(run, first_step)
    for step in range(first_step, setup.num_steps):
        if run.ended is not None:
            break
        run.progress.begin("first step" if step == first_step else f"step {step + 1}")
        run.profile.before(step + 1)
        record = training_step(run, step)
        steady()
        run.progress.begin("between steps")
        run.stopping.step_took(record["step_seconds"])
        done = run.record.last_step = step + 1
        stalls.look(done, record["grad_norm"], record["learning_rate"])
        is_last = done == setup.num_steps
        run.profile.after(done, is_last)
        if reference_moves_after(config, step):
            run.engine.wait_for_parameters()
            run.references.move(run.engine.stage, config.reference.mixup_alpha)
        is_evaluated = setup.eval and (is_last or bool(config.eval.every and done % config.eval.every == 0))
        held_out = evaluation(run) if is_evaluated else {}
        record |= held_out
        is_best = bool(held_out) and take(run, done, held_out)
        is_written = is_last or bool(held_out) or done % config.logging.every == 0
        if is_written:
            run.write(record)
        run.metrics |= record
        ask(run, "on_step_end", done, record)
        if run.ended is not None and not is_written:
            run.write(record)
        if run.ended is not None and setup.eval and not is_evaluated:
            is_best = evaluate_and_write(run, done)
        ends = is_last or run.ended is not None
        is_saved = save_where_due(run, done, ends, is_best)
        if run.stopping.agreed is not None and (is_saved or not ends):
            raise stopped(run, done, is_saved)
        run.saver.report()
    run.saver.finish()
    if run.evaluation_due:
        log("warning: the last evaluation was left out, for the run was told to stop")
    return run.metrics


def before_first_step(run: Run, first_step: int) -> None:
    """The user's `on_begin`; the evaluation that was left out when the run was stopped, or that `eval.at_start` asks for.

    Raises:
        Stopped: as `training_loop`.
    """
    from megadpo.training.held_out import evaluate_and_write

    setup, config = run.setup, run.setup.config
    call(run.callbacks.on_begin, RunInfo(config, setup.num_steps, first_step, setup.output_dir, setup, run.engine))
    is_left_out = run.evaluation_due
    if not setup.eval or not (is_left_out or (config.eval.at_start and first_step == 0)):
        return
    is_best = evaluate_and_write(run, first_step)
    is_there = first_step > 0 and setup.resumes_own
    if run.evaluation_due:
        is_saved = is_there or save_where_due(run, first_step, is_last=False)
        raise stopped(run, first_step, is_saved)
    if not is_there and (is_best or run.ended is not None):
        save_where_due(run, first_step, is_last=run.ended is not None, is_best=is_best)


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
        if setup.stream is not None:
            require_same_groups(run.groups)
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


def export(run: Run) -> Result:
    """Write the policy, of the best evaluation where that is asked for, as a Hugging Face directory; collective."""
    from megadpo.training.run_state import export_policy, take_best

    run.progress.begin("exporting")
    setup, last, best = run.setup, run.record.last_step, run.best
    chosen = take_best(run, last)
    value = None if chosen is None else best.value_at(chosen)
    if chosen is not None:
        run.record.best = {"best_step": chosen, "best_metric": best.metric, "best_value": value}
    with activity("exporting the trained model"):
        directory = export_policy(run)
    if chosen is not None:
        log(f"{directory} is the model of step {chosen}, the best by {best.metric} ({value:.6g}); the last step is {last}")
    log(f"trained model: {directory}")
    ended = run.record.why = None if run.ended is None else run.ended.why
    return Result(run.metrics, last, directory, setup.output_dir, best_step=chosen, best_value=value, ended=ended)
