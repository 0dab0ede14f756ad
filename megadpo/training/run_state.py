"""The state of a run: saved, resumed, and exported as a Hugging Face model. Every function here is collective."""

from __future__ import annotations

import base64
import functools
import math
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megadpo.checkpoint.export import finish_export, join_tensor_ranks, plan_export, write_export_files
from megadpo.checkpoint.sharded import (
    begin,
    commit,
    open_checkpoint,
    step_checkpoints,
    step_directory,
    write_shard_file,
    writer_name,
)
from megadpo.checkpoint.staging import remove
from megadpo.data.rows.report import counted
from megadpo.engine.megatron import is_first_replica
from megadpo.model.build import stage_shards
from megadpo.model.families import ParameterShard
from megadpo.model.moe.layer import is_expert, moved
from megadpo.model.weights import fill_shard, load_weights
from megadpo.objectives.coupled import RunningMean
from megadpo.parallel.zero3 import whole
from megadpo.platform.device import compute_device
from megadpo.training.console import log
from megadpo.training.run import Run


def save(run: Run, step: int) -> Path:
    """Write the checkpoint of `step` and remove the oldest beyond `checkpoint.keep`."""
    run.references.train.write()  # a resumed run finds what this one has seen of it
    setup, root = run.setup, run.setup.output_dir / "checkpoints"
    directory = step_directory(root, step)
    if dist.get_rank() == 0:
        begin(directory)
    dist.barrier()
    items = _owned_state(run)
    stage, tensor_rank, data_rank = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    # Of data-parallel ranks above the first, those that are the first with their experts have something to write.
    name = writer_name(stage, tensor_rank) + (f"-dp{data_rank:02d}" if data_rank else "")
    manifest = write_shard_file(directory, name, items)
    delta = _last_stage_delta(run)
    manifests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(manifests, manifest)
    if dist.get_rank() == 0:
        state = {
            "step": step,
            "num_steps": setup.num_steps,
            "num_samples": step * setup.config.train.pairs_per_step,
            "num_tokens": run.num_tokens_seen,
            "delta": delta,
            "evaluation_due": run.evaluation_due,
            "metrics": {name: value for name, value in run.metrics.items() if math.isfinite(value)},
            "dtype": str(setup.dtype).removeprefix("torch."),
            "data_digest": setup.train.groups.digest,
            "config": setup.config.to_dict(),
            "rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        }
        commit(directory, manifests, state, setup.policy.huggingface, setup.policy.config)
        earlier = [path for path in step_checkpoints(root) if int(path.name[5:]) <= step]
        for old in earlier[: -setup.config.checkpoint.keep]:
            remove(old)
    dist.barrier()
    return directory


def _last_stage_delta(run: Run) -> list[float]:
    """BCO's running mean as [sum, count], of the last stage, which alone sees rewards; on every rank."""
    delta = torch.tensor([run.running_mean.total, run.running_mean.count], dtype=torch.float64, device=compute_device())
    dist.broadcast(delta, dist.get_world_size() - 1)  # Megatron numbers ranks stage by stage
    return delta.tolist()


def _owned_state(run: Run) -> Iterator[tuple[str, ParameterShard, Tensor]]:
    """What this rank writes: each shard that several ranks hold is written by the first of them."""
    for kind, name, tensor in run.engine.state():  # every rank takes part in putting each tensor together
        parameter, shard = run.engine.stage.parameters[name]
        if is_first_replica(parameter):
            yield kind, shard, tensor
    if run.setup.config.reference.sync_every:
        assert run.references.train.stage is not None
        for parameter, shard in run.references.train.stage.parameters.values():
            values = whole(parameter)  # every rank takes part
            if is_first_replica(parameter):
                yield "reference", shard, values


def resume(run: Run) -> int:
    """Load weights, optimizer and position from the checkpoint that the set-up names (and has checked); the steps done.

    Raises:
        UserError: the checkpoint is damaged.
    """
    assert run.setup.resume is not None
    checkpoint = open_checkpoint(run.setup.resume)
    state = checkpoint.state
    step = int(state["step"])
    if state["num_steps"] != run.setup.num_steps:
        log(
            f"the run was planned for {counted(state['num_steps'], 'step')} and now has {run.setup.num_steps}: "
            "the learning rate follows the new plan from here on"
        )
    sources = {kind: checkpoint.source(kind) for kind in ("weights", "exp_avg", "exp_avg_sq")}

    def read(kind: str, name: str) -> Tensor:
        parameter, shard = run.engine.stage.parameters[name]
        tensor = torch.empty(shard.shape, dtype=torch.float32, device=parameter.device)
        fill_shard(shard, sources[kind], tensor)
        return tensor

    run.engine.load_state(read, step)
    if run.setup.config.reference.sync_every:
        assert run.references.train.stage is not None
        load_weights(run.references.train.stage, checkpoint.source("reference"))
    run.num_tokens_seen = int(state["num_tokens"])
    total, count = state.get("delta", (0.0, 0))
    run.running_mean = RunningMean(float(total), int(count))
    run.metrics = dict(state["metrics"])
    run.evaluation_due = state.get("evaluation_due") is True
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["rng"])), dtype=torch.uint8))
    return step


def set_aside_later(root: Path, step: int) -> None:
    """Move checkpoints beyond `step` out of the way: they belong to what this run is about to do anew. Rank 0 calls it."""
    later = [path for path in step_checkpoints(root) if int(path.name[5:]) > step]
    if later:
        aside = next(path for n in count(1) if not (path := root / f"aside-{n}").exists())
        aside.mkdir()
        for path in later:
            path.rename(aside / path.name)


def export_policy(run: Run) -> Path:
    """Write the policy to `output_dir/hf`, each pipeline stage the files of its chunks, in place of an earlier export."""
    setup, directory = run.setup, run.setup.output_dir / "hf"
    config, layout = setup.policy.config, setup.layout
    export = plan_export(config, setup.dtype, layout.layers_of_chunks(setup.policy.shape.num_layers))
    if dist.get_rank() == 0:
        begin(directory)
    dist.barrier()
    tensors = _whole_tensors(run)
    if _is_writer():
        write_export_files(export, directory, tensors)
    else:
        for _ in tensors:  # takes part in gathering them
            pass
    dist.barrier()
    if dist.get_rank() == 0:
        finish_export(export, directory, setup.policy.huggingface)
    dist.barrier()
    return directory


def _is_writer() -> bool:
    """Whether this rank writes its pipeline stage's tensors: the first of the stage, in every group of ranks a first one."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    )


def _whole_tensors(run: Run) -> Iterator[tuple[str, Tensor]]:
    """Whole Hugging Face tensors of this stage, put together on its writer; the other ranks yield nothing.

    Experts are gathered from the ranks that share them, all else from the tensor ranks of the first replica.
    """
    layout, stage = run.setup.layout, run.engine.stage

    @functools.cache
    def shards_of(tensor_rank: int, expert_rank: int, expert_tensor_rank: int) -> dict[str, ParameterShard]:
        ranks = (tensor_rank, expert_rank, expert_tensor_rank)
        return {shard.name: shard for shard in stage_shards(run.setup.policy.shape, layout, *ranks)}

    for name, values in run.engine.parameters():
        parameter, shard = stage.parameters[name]
        if not shard.is_primary or not is_first_replica(parameter):
            continue  # the embedding's stage, or the first replica, gives it
        if is_expert(name):
            group = parallel_state.get_expert_tensor_and_model_parallel_group()
            count, num_local = layout.expert_tensor, stage.model.config.num_moe_experts // layout.expert
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
