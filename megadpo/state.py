"""The state of a run: saved, resumed, and exported as a Hugging Face model. Every function here is collective."""

from __future__ import annotations

import base64
import math
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megadpo.checkpoint.convert import writer_name
from megadpo.checkpoint.export import finish_export, join_tensor_ranks, plan_export, write_export_files
from megadpo.checkpoint.hf import fill_shard
from megadpo.checkpoint.sharded import (
    begin,
    commit,
    open_checkpoint,
    step_checkpoints,
    step_directory,
    write_shard_file,
)
from megadpo.model.build import load_weights, stage_shards
from megadpo.model.families import ParameterShard
from megadpo.objectives.coupled import RunningMean
from megadpo.parallel.partitioned import whole
from megadpo.platform.device import compute_device

if TYPE_CHECKING:
    from megadpo.train import Run


def save(run: Run, step: int) -> Path:
    """Write the checkpoint of `step` and remove the oldest beyond `checkpoint.keep`."""
    plan, root = run.plan, run.plan.output_dir / "checkpoints"
    directory = step_directory(root, step)
    if dist.get_rank() == 0:
        begin(directory)
    dist.barrier()
    items = _owned_state(run)
    manifest: dict[str, Any] | None = None
    if parallel_state.get_data_parallel_rank() == 0:
        stage, tensor_rank = (
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_rank(),
        )
        manifest = write_shard_file(directory, writer_name(stage, tensor_rank), items)
    else:
        for _ in items:  # takes part in putting each tensor together over the replicas
            pass
    delta = _last_stage_delta(run)
    manifests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(manifests, manifest)
    if dist.get_rank() == 0:
        state = {
            "step": step,
            "num_steps": plan.num_steps,
            "num_samples": step * plan.config.train.pairs_per_step,
            "num_tokens": run.num_tokens_seen,
            "delta": delta,
            "metrics": {name: value for name, value in run.metrics.items() if math.isfinite(value)},
            "dtype": str(plan.dtype).removeprefix("torch."),
            "data_digest": plan.train.groups.digest,
            "config": plan.config.to_dict(),
            "rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        }
        commit(directory, [entry for entry in manifests if entry], state, plan.policy.huggingface, plan.policy.config)
        earlier = [path for path in step_checkpoints(root) if int(path.name[5:]) <= step]
        for old in earlier[: -plan.config.checkpoint.keep]:
            shutil.rmtree(old)
    dist.barrier()
    return directory


def _last_stage_delta(run: Run) -> list[float]:
    """BCO's running mean as [sum, count], of the last stage, which alone sees rewards; on every rank."""
    delta = torch.tensor([run.delta.total, run.delta.count], dtype=torch.float64, device=compute_device())
    dist.broadcast(delta, dist.get_world_size() - 1)  # Megatron numbers ranks stage by stage
    return delta.tolist()


def _owned_state(run: Run) -> Iterator[tuple[str, ParameterShard, Tensor]]:
    for kind, name, tensor in run.engine.state():
        yield kind, run.engine.stage.parameters[name][1], tensor
    if run.plan.config.reference.sync_every:
        assert run.references.stage is not None
        for parameter, shard in run.references.stage.parameters.values():
            yield "reference", shard, whole(parameter)


def resume(run: Run) -> int:
    """Load weights, optimizer and position from the checkpoint that the plan names (and has checked); the steps done.

    Raises:
        UserError: the checkpoint is damaged.
    """
    assert run.plan.resume is not None
    checkpoint = open_checkpoint(run.plan.resume)
    state = checkpoint.state
    step = int(state["step"])
    if state["num_steps"] != run.plan.num_steps:
        run.say(
            f"the run was planned for {state['num_steps']} steps and now has {run.plan.num_steps}: "
            "the learning rate follows the new plan from here on"
        )
    sources = {kind: checkpoint.source(kind) for kind in ("weights", "exp_avg", "exp_avg_sq")}

    def read(kind: str, name: str) -> Tensor:
        parameter, shard = run.engine.stage.parameters[name]
        tensor = torch.empty(shard.shape, dtype=torch.float32, device=parameter.device)
        fill_shard(shard, sources[kind], tensor)
        return tensor

    run.engine.load_state(read, step)
    if run.plan.config.reference.sync_every:
        assert run.references.stage is not None
        load_weights(run.references.stage, checkpoint.source("reference"))
    run.num_tokens_seen = int(state["num_tokens"])
    total, count = state.get("delta", (0.0, 0))
    run.delta = RunningMean(float(total), int(count))
    run.metrics = dict(state["metrics"])
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
    """Write the policy to `output_dir/hf`, each pipeline stage its own files, in place of an earlier export."""
    plan, directory = run.plan, run.plan.output_dir / "hf"
    config, layout = plan.policy.config, plan.layout
    stages = [layout.layers_of_stage(config.num_hidden_layers, stage) for stage in range(layout.pipeline)]
    export = plan_export(config, plan.dtype, stages)
    if dist.get_rank() == 0:
        begin(directory)
    dist.barrier()
    tensors = _whole_tensors(run)
    if parallel_state.get_data_parallel_rank() == 0 and parallel_state.get_tensor_model_parallel_rank() == 0:
        write_export_files(export, directory, tensors)
    else:
        for _ in tensors:  # takes part in putting each tensor together
            pass
    dist.barrier()
    if dist.get_rank() == 0:
        finish_export(export, directory, plan.policy.huggingface)
    dist.barrier()
    return directory


def _whole_tensors(run: Run) -> Iterator[tuple[str, Tensor]]:
    """Whole Hugging Face tensors of this stage, put together on tensor rank 0 of replica 0; others yield nothing."""
    group, num_tensor = parallel_state.get_tensor_model_parallel_group(), run.plan.layout.tensor
    is_root = parallel_state.get_tensor_model_parallel_rank() == 0
    shards_by_rank = [
        {shard.name: shard for shard in stage_shards(run.plan.policy.config, run.plan.layout, rank)}
        for rank in range(num_tensor)
    ]
    for name, values in run.engine.parameters():
        shard = run.engine.stage.parameters[name][1]
        if not shard.is_primary or parallel_state.get_data_parallel_rank() != 0:
            continue  # the embedding's stage writes it, and the first replica
        if shard.partition_dim is None or num_tensor == 1:
            parts = [(shards_by_rank[0][name], values)]
        else:
            received = [torch.empty_like(values) for _ in range(num_tensor)] if is_root else None
            dist.gather(values.contiguous(), received, group_dst=0, group=group)
            parts = [(shards_by_rank[rank][name], tensor) for rank, tensor in enumerate(received or [])]
        if is_root:
            yield from join_tensor_ranks(parts)
