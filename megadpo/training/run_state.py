"""The state of a run: saved, resumed, and exported as a Hugging Face model. Every function here is collective."""

from __future__ import annotations

import base64
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megadpo.checkpoint.export import join_tensor_ranks
from megadpo.checkpoint.finite import FiniteWatch
from megadpo.checkpoint.sharded import (
    Checkpoint,
    begin,
    is_checkpoint,
    step_directories,
    step_directory,
    writer_name,
)
from megadpo.checkpoint.staging import abandon, writing
from megadpo.data.rows.report import counted
from megadpo.engine.megatron_optimizer import is_first_replica
from megadpo.engine.parameter_groups import kept_of
from megadpo.errors import UserError
from megadpo.model.build import stage_shards
from megadpo.model.families import ParameterShard
from megadpo.model.families.fill import fill_shard
from megadpo.model.moe.layer import is_expert, moved
from megadpo.model.weights import load_weights
from megadpo.objectives.coupled import RunningMean
from megadpo.parallel.agreement import first_problem, from_all_ranks, problem_of
from megadpo.parallel.zero3 import whole
from megadpo.platform.device import compute_device
from megadpo.secrets.redact import redacted
from megadpo.training.console import log
from megadpo.training.export_files import export_files
from megadpo.training.feed import StreamFeed
from megadpo.training.model_card import with_card
from megadpo.training.non_finite import Part, own_weights, require_finite
from megadpo.training.resume import newest_that_opens
from megadpo.training.run import Ended, Run
from megadpo.training.saving import Save
from megadpo.training.training_state import TrainingState


def save(run: Run, step: int) -> Path:
    """Save the state after `step`, at once or behind the step loop (saving.py); where the checkpoint is, or will be.

    Raises:
        UserError: this save, or the one that was being written, failed, and `checkpoint.on_failed_write` is `stop`.
    """
    run.references.train.write()  # a resumed run finds what this one has seen of it
    setup = run.setup
    stage, tensor_rank, data_rank = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    # Of data-parallel ranks above the first, those that are the first with their experts have something to write.
    name = writer_name(stage, tensor_rank) + (f"-dp{data_rank:02d}" if data_rank else "")
    state = {
        "step": step,
        "num_steps": setup.num_steps,
        "num_samples": step * setup.config.train.pairs_per_step,
        "num_tokens": run.num_tokens_seen,
        "delta": _last_stage_delta(run),
        "spikes": run.spikes.state(),
        "evaluation_due": run.evaluation_due,
        "best": run.best.state(),
        "ended": {} if run.ended is None else asdict(run.ended),
        "metrics": {name: value for name, value in run.metrics.items() if math.isfinite(value)},
        "dtype": str(setup.dtype).removeprefix("torch."),
        "data_digest": setup.search.inputs["data"],
        **({} if run.position is None else {"stream": run.position.to_dict()}),
        "inputs": setup.search.inputs,
        "resumed_from": setup.resumed_from,
        "config": redacted(setup.config.to_dict()),
        "optimizer": setup.search.optimizer,
        **({} if setup.search.adapter is None else {"adapter": setup.search.adapter}),
        "rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }
    watch = FiniteWatch()

    def check(abandon: Callable[[], None]) -> None:
        require_finite(watch, _own_state(run), f"step {step}", abandon, lambda: _advice(run))

    return run.saver.save(Save(step, name, _seen(_owned_state(run), watch), state, check), _num_bytes(run))


def _num_bytes(run: Run) -> int:
    """Of what `_owned_state` gives here: fp32 weights and moments, and a moving reference."""
    owned = [shard for parameter, shard in run.engine.stage.held.values() if is_first_replica(parameter)]
    num_always = 1 + (run.setup.config.reference.sync_every is not None)
    num_kinds = [num_always + len(kept_of(shard, run.setup.config.train)) for shard in owned]
    return 4 * sum(num * math.prod(shard.shape) for num, shard in zip(num_kinds, owned, strict=True))


def _last_stage_delta(run: Run) -> list[float]:
    """BCO's running mean as [sum, count], of the last stage, which alone sees rewards; on every rank."""
    delta = torch.tensor([run.running_mean.total, run.running_mean.count], dtype=torch.float64, device=compute_device())
    dist.broadcast(delta, dist.get_world_size() - 1)  # Megatron numbers ranks stage by stage
    return delta.tolist()


def _owned_state(run: Run) -> Iterator[tuple[str, ParameterShard, Tensor]]:
    """What this rank writes: each shard that several ranks hold is written by the first of them."""
    for kind, name, tensor in run.engine.state():  # every rank takes part in putting each tensor together
        parameter, shard = run.engine.stage.held[name]
        if is_first_replica(parameter):
            yield kind, _kept_part(run, kind, shard), tensor
    if run.setup.config.reference.sync_every:
        assert run.references.train.stage is not None
        for parameter, shard in run.references.train.stage.held.values():
            values = whole(parameter)  # every rank takes part
            if is_first_replica(parameter):
                yield "reference", shard, values.clone()  # it moves while it is written


def _kept_part(run: Run, kind: str, shard: ParameterShard) -> ParameterShard:
    """The shard without the tensors of which a checkpoint does not have this kind."""
    names = run.setup.search.kept[kind]
    return replace(shard, pieces=tuple(piece for piece in shard.pieces if piece.logical_name in names))


def _seen(
    items: Iterable[tuple[str, ParameterShard, Tensor]], watch: FiniteWatch
) -> Iterator[tuple[str, ParameterShard, Tensor]]:
    for kind, shard, tensor in items:
        watch.see(f"{kind} of {shard.name}", tensor)
        yield kind, shard, tensor


def _own_state(run: Run) -> Iterator[Part]:
    """What this rank itself keeps of what a checkpoint has."""
    yield from run.engine.own_state()
    if run.setup.config.reference.sync_every:
        assert run.references.train.stage is not None
        yield from own_weights(run.references.train.stage, "reference's weights")


def _advice(run: Run) -> str:
    newest = newest_that_opens([run.setup.output_dir / "checkpoints"])
    earlier = "there is no earlier checkpoint" if newest is None else f"{newest} is the last intact checkpoint"
    return f"{earlier}; lower train.learning_rate"


def resume(run: Run) -> int:
    """Load weights, optimizer and position from the checkpoint that the set-up names (and has checked); the steps done.

    Raises:
        UserError: the checkpoint is damaged.
    """
    assert run.setup.resume is not None
    setup = run.setup
    checkpoint, state = setup.search.open(run.setup.resume)
    if state.num_steps != setup.num_steps:
        log(
            f"the run was planned for {counted(state.num_steps, 'step')} and now has {setup.num_steps}: "
            "the learning rate follows the new plan from here on"
        )
    run.spikes.load(state.spikes)
    _load_engine(run, checkpoint, state)
    if setup.search.with_reference:
        assert run.references.train.stage is not None
        load_weights(run.references.train.stage, checkpoint.source("reference"))
    run.num_tokens_seen = state.num_tokens
    run.running_mean = RunningMean(*state.delta)
    run.metrics = dict(state.metrics)
    run.evaluation_due = state.evaluation_due
    if isinstance(run.feed, StreamFeed):
        is_same = state.inputs.get("stream") == setup.search.inputs["stream"]
        run.position = state.position if is_same else None
        run.feed.go_on(state.step, run.position)
        if run.position is not None:
            log(f"data.train goes on after {counted(run.position.report.num_rows, 'row')}")
        elif state.step > 0:
            log("warning: data.train is read from its beginning again: the checkpoint is of another stream, or of none")
    torch.set_rng_state(state.random_state)
    _resume_best(run, state)
    return state.step


def _load_engine(run: Run, checkpoint: Checkpoint, state: TrainingState) -> None:
    """Weights and optimizer state of a checkpoint, in place of what the engine has."""
    sources = {kind: checkpoint.source(kind) for kind in run.setup.search.kept}

    def read(kind: str, name: str) -> Tensor:
        parameter, shard = run.engine.stage.held[name]
        tensor = torch.empty(shard.shape, dtype=torch.float32, device=parameter.device)
        fill_shard(_kept_part(run, kind, shard), sources[kind], tensor)
        return tensor

    run.engine.load_state(read, state.step - int(state.spikes.get("num_left_out", 0)))


def _resume_best(run: Run, state: TrainingState) -> None:
    """The best evaluation so far, and whether the run has ended with the checkpoint; of another run's neither counts."""
    metric = run.best.metric
    goes_on = run.setup.resumes_own and run.best.load(state.best)
    if metric is not None and not goes_on and state.step > 0:
        log(f"the evaluations up to step {state.step} were not compared by {metric}: the best is looked for from here on")
    if state.ended and run.setup.resumes_own:
        ended = Ended(state.ended.get("why", ""), state.ended.get("by", ""))
        if ended.by == "patience" and not run.best.is_out_of_patience:
            log(f"the run had ended after step {state.step} ({ended.why}); with what eval.patience is now it goes on")
        else:
            run.ended = ended


def take_best(run: Run, last_step: int) -> int | None:
    """Put the model of the best evaluation in place of the last one, from its checkpoint; the step of the one that is there
    now, None where it is the last and was not chosen."""
    if run.best.step == last_step:
        return last_step
    root = run.setup.output_dir / "checkpoints"
    there = (step for step in reversed(run.best.steps) if is_checkpoint(step_directory(root, step)))
    best: int | None = from_all_ranks(next(there, None))[0]  # rank 0's view of a shared disk is everybody's
    if best is None:
        if run.best.metric is not None:
            log("warning: no evaluation has a checkpoint to export as the best one: hf/ is the last model")
        return None
    directory, search = step_directory(root, best), run.setup.search

    def examine() -> None:
        search.look_at(directory)
        search.hash_files(directory, dist.get_rank(), dist.get_world_size())

    problem = first_problem(problem_of(examine))
    if problem is not None:
        log(f"warning: the checkpoint of the best evaluation cannot be exported ({problem}): hf/ is the last model")
        return None
    run.engine.wait_for_parameters()
    _load_engine(run, *search.open(directory))
    return best


def set_aside_later(root: Path, step: int) -> None:
    """Move checkpoints beyond `step` out of the way: they belong to what this run is about to do anew. Rank 0 calls it."""
    later = [path for path in step_directories(root) if int(path.name[5:]) > step]
    if later:
        aside = next(path for n in count(1) if not (path := root / f"aside-{n}").exists())
        with writing(aside):
            aside.mkdir()
            for path in later:
                path.rename(aside / path.name)


def export_policy(run: Run) -> Path:
    """Write the policy to `output_dir/hf`, each pipeline stage the files of its chunks, in place of an earlier export.

    Of adapters, `hf` is a PEFT directory, or the model that they make with the policy's files (`adapter.merge`).

    Raises:
        UserError: a disk is full or refuses; the earlier export is as it was.
    """
    setup, directory = with_card(run.setup, _metrics_of_exported(run), exported_text(run)), run.setup.output_dir / "hf"
    watch, export = FiniteWatch(), export_files(setup, parallel_state.get_pipeline_model_parallel_rank())
    is_first, tensors = dist.get_rank() == 0, _whole_tensors(run, watch)
    problem = first_problem(problem_of(lambda: begin(directory)) if is_first else None)
    if problem is None:
        if _is_writer():
            problem = problem_of(lambda: export.write(directory, tensors))
        for _ in tensors:  # takes part in gathering them, as a rank whose disk is full does
            pass
        problem = first_problem(problem)
        if problem is None:
            own = own_weights(run.engine.stage)
            require_finite(watch, own, "the trained model", lambda: abandon(directory), lambda: _advice(run))
        if is_first and problem is None:
            problem = problem_of(run.check_owner)
        if is_first and problem is None:
            problem = problem_of(lambda: export.finish(directory))
        if is_first and problem is not None:
            abandon(directory)
        problem = first_problem(problem)
    if problem is not None:
        raise UserError(f"the trained model is not exported: {problem}")
    return directory


def _metrics_of_exported(run: Run) -> dict[str, float]:
    """The last step's metrics, or, of an earlier model, the one that it was chosen by."""
    best = run.record.best
    if not best or best["best_step"] == run.record.last_step:
        return run.metrics
    return {"step": best["best_step"], best["best_metric"]: best["best_value"]}


def exported_text(run: Run) -> str:
    """A sentence on whose the exported model is, where it is not that of the planned last step; else "". Not collective."""
    last, found = run.record.last_step, run.record.best
    parts = [f"the run ended after step {last} of {run.setup.num_steps} ({run.ended.why})"] if run.ended else []
    if found:
        parts.append(f"this is the model of step {found['best_step']}, the best by `{found['best_metric']}`")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _is_writer() -> bool:
    """Whether this rank writes its pipeline stage's tensors: the first of the stage, in every group of ranks a first one."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    )


def _whole_tensors(run: Run, watch: FiniteWatch) -> Iterator[tuple[str, Tensor]]:
    """Whole Hugging Face tensors of this stage, put together on its writer; the other ranks yield nothing.

    Experts are gathered from the ranks that share them, all else from the tensor ranks of the first replica.
    """
    layout, stage, adapter = run.setup.layout, run.engine.stage, run.setup.adapter
    spec = None if adapter is None else adapter.spec

    @functools.cache
    def shards_of(tensor_rank: int, expert_rank: int, expert_tensor_rank: int) -> dict[str, ParameterShard]:
        ranks = (tensor_rank, expert_rank, expert_tensor_rank)
        return {shard.name: shard for shard in stage_shards(run.setup.policy.shape, layout, *ranks, spec)}

    for name, values in watch.passing(run.engine.parameters()):
        parameter, shard = stage.held[name]
        if not shard.is_primary or not is_first_replica(parameter):
            continue  # the embedding's stage, or the first replica, gives it
        if is_expert(name):
            group, count = parallel_state.get_expert_tensor_and_model_parallel_group(), layout.expert_tensor
            if shard.partition_dim is None:  # whole on each expert-tensor rank, as an adapter's A may be: the first gives it
                group, count = parallel_state.get_expert_model_parallel_group(), 1
            num_local = stage.models[0].config.num_moe_experts // layout.expert
            here = parallel_state.get_expert_model_parallel_rank()
            holders = [
                [(moved(name, (expert - here) * num_local), (0, expert, rank)) for rank in range(count)]
                for expert in range(layout.expert)
            ]
        else:
            group = parallel_state.get_tensor_model_parallel_group()
            count = 1 if shard.partition_dim is None else layout.tensor
            holders = [[(name, (rank, 0, 0)) for rank in range(count)]]
        tensors = [values]
        if len(holders) * count > 1:
            tensors = [torch.empty_like(values) for _ in range(len(holders) * count)] if _is_writer() else []
            dist.gather(values.contiguous(), tensors or None, group_dst=0, group=group)
        if _is_writer():
            for first, ranks in zip(range(0, len(tensors), count), holders, strict=True):
                shards = [shards_of(*holder)[held] for held, holder in ranks]
                yield from join_tensor_ranks(list(zip(shards, tensors[first : first + count], strict=True)))
