"""Megatron's distributed optimizer, and what takes the place of the AdamW in it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from megadpo.config.schema import TrainConfig
from megadpo.engine.bf16_moments import AdamWWithBf16Moments
from megadpo.engine.host_moments import AdamWWithHostMoments
from megadpo.engine.muon import MuonShard
from megadpo.engine.optimizer import Piece
from megadpo.engine.parameter_groups import Run, settings_of
from megadpo.model.families import ParameterShard, names_in
from megadpo.platform.megatron_cpu import cpu_tensors_pass_for_cuda
from megadpo.platform.step_clock import TIMERS


def distributed_optimizer(models: list[DistributedDataParallel], train: TrainConfig, overlap: bool) -> Any:
    """Megatron's ZeRO-1 AdamW (`ChainedOptimizer` of `DistributedOptimizer`s)."""
    params_dtype = models[0].config.params_dtype
    options = OptimizerConfig(
        optimizer="adam",
        lr=train.learning_rate,
        weight_decay=train.weight_decay,
        adam_beta1=train.betas[0],
        adam_beta2=train.betas[1],
        adam_eps=train.eps,
        clip_grad=train.clip_norm,
        bf16=params_dtype is torch.bfloat16,
        params_dtype=params_dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=overlap,
        timers=TIMERS,
    )
    with cpu_tensors_pass_for_cuda(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_megatron_optimizer(options, models, use_gloo_process_groups=False)


def choose_adamw(optimizer: Any, moments: str) -> None:
    """Replace torch's AdamW by ours where moments are bfloat16 or in host memory, else by torch's fused one."""
    if moments == "host":
        for part in optimizer.chained_optimizers:
            part.optimizer = AdamWWithHostMoments.with_groups_of(part.optimizer)
    elif moments == "bf16":
        for part in optimizer.chained_optimizers:
            part.optimizer = AdamWWithBf16Moments.with_groups_of(part.optimizer)
    elif isinstance(optimizer.chained_optimizers[0].optimizer, torch.optim.AdamW):
        # One pass over the memory instead of a dozen; Megatron leaves torch's choice, which on a CPU is a loop.
        for group in optimizer.param_groups:
            group["fused"] = True


def pieces_of(runs: Sequence[Run], owned: slice, main: Tensor) -> Iterator[Piece]:
    """The parts of the runs of a flattened shard that lie in `main`, which is its elements `owned`."""
    for run in runs:
        start, end = max(run.start, owned.start), min(run.end, owned.stop)
        if start < end:
            yield Piece.of(main, slice(start - owned.start, end - owned.start), run.settings)


def muon_shard(
    parameter: torch.nn.Parameter, shard: ParameterShard, train: TrainConfig, first: int, pieces: Sequence[Piece]
) -> Iterator[MuonShard]:
    """The parameter as Muon has it, none where it is AdamW's; `pieces` are of a range that begins at element `first`."""
    names = [name for name in names_in(shard) if settings_of(name, len(shard.shape), train).rule == "muon"]
    if not names:
        return
    tensor_ranks = parallel_state.get_tensor_model_parallel_group()
    if not getattr(parameter, "allreduce", True):
        tensor_ranks = parallel_state.get_expert_tensor_parallel_group()
    is_cut = shard.partition_dim is not None and dist.get_world_size(tensor_ranks) > 1
    own = [(first, piece) for piece in pieces if piece.settings.rule == "muon"]
    yield MuonShard(shard, replicas_of(parameter), tensor_ranks if is_cut else None, frozenset(names), own)


def replicas_of(parameter: torch.nn.Parameter) -> dist.ProcessGroup:
    """The ranks that hold the same shard of a parameter: experts have fewer replicas."""
    if getattr(parameter, "allreduce", True):
        return parallel_state.get_data_parallel_group(with_context_parallel=True)
    return parallel_state.get_expert_data_parallel_group()


def is_first_replica(parameter: torch.nn.Parameter) -> bool:
    """Whether this rank is the first of `replicas_of` a parameter."""
    return dist.get_rank(replicas_of(parameter)) == 0
