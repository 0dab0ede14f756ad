"""Bytes a rank holds of parameters, gradients and optimizer state under each ZeRO stage, against the formula.

    torchrun --nproc-per-node 4 -m benchmarks zero_memory --model DIRECTORY

Counted are the storages of all tensors that are alive once a step's gradients are reduced, when moments exist already, less
those that were alive before the engine. In fp32 with N replicas and P parameters the formula is: stage 0 16 P (weights,
gradients, two moments); stages 1 and 2 4 P + 16 P / N (DeepSpeed keeps the weights it updates apart; stage 1 has another
4 P of gradients while it adds micro-batches up); stage 3 16 P / N.
Stage 3 also keeps small parameters and those soon used again (a DeepSpeed JSON says which), which shows in small models.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.common import print_table
from megadpo.config.schema import ObjectiveConfig, ParallelConfig, TrainConfig
from megadpo.data.groups import Group
from megadpo.data.store import GroupStore
from megadpo.model.activations import KEEP
from megadpo.objectives.coupled import RunningMean
from megadpo.objectives.objective import Objective
from megadpo.parallel.layout import Layout


def formula(stage: int, num_parameters: int, num_replicas: int) -> float:
    """Bytes a rank, see the head of this file."""
    whole, shared = {0: (16, 0), 1: (4, 16), 2: (4, 16), 3: (0, 16)}[stage]
    return whole * num_parameters + shared * num_parameters / num_replicas


def bytes_by_stage(model: Path, groups: list[Group], deepspeed_config: str | None = None) -> tuple[int, dict[int, int]]:
    """Number of parameters, and this rank's bytes under each stage; every process is a replica."""
    from megadpo.checkpoint.hf import open_hf, read_hf_config
    from megadpo.data.batches.packed_dataset import PackedDataset, PackingOptions
    from megadpo.parallel.world import joined_world

    layout, found, num_parameters = Layout(data=dist.get_world_size()), {}, 0
    packing = PackedDataset.of(
        GroupStore.of(groups),
        PackingOptions(
            tokens_per_micro_batch=256,
            setting="tokens_per_micro_batch",
            num_data_parallel=layout.data,
            hidden_size=64,
        ),
    )
    objective = Objective.of(ObjectiveConfig(loss_type="sft"))
    for stage in range(4):
        with joined_world(layout, seed=1):
            from megadpo.engine.deepspeed.engine import ZeroEngine, policy_stage
            from megadpo.model.families import shape_of
            from megadpo.training.global_batch import pack_global_batch
            from megadpo.training.reference import NoReference
            from megadpo.training.step import optimizer_step

            batch = pack_global_batch(packing, np.arange(len(groups)), objective)
            before = _storages()
            parallel = ParallelConfig(engine="deepspeed", zero_stage=stage, deepspeed_config=deepspeed_config)
            loaded = policy_stage(shape_of(read_hf_config(model)), open_hf(model), layout, torch.float32, KEEP, parallel)
            num_parameters = sum(torch.Size(shard.shape).numel() for _, shard in loaded.parameters.values())
            engine = ZeroEngine(loaded, TrainConfig(), parallel)
            after: dict[int, int] = {}

            def note_storages(after: dict[int, int] = after) -> None:
                after.clear()
                after.update(_storages())

            for _ in range(2):  # moments are there from the second step on
                optimizer_step(engine, NoReference(), batch, objective, RunningMean(), 1e-4, on_gradients=note_storages)
            found[stage] = sum(size for address, size in after.items() if address not in before)
            del engine, loaded
            gc.collect()
    return num_parameters, found


def _storages() -> dict[int, int]:
    """Bytes of each live storage of a tensor, by address."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor) and item.device.type != "meta"]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    from benchmarks.material import MIXES, synthetic_groups
    from megadpo.checkpoint.hf import read_hf_config

    dist.init_process_group()
    vocab_size = read_hf_config(options.model).vocab_size
    groups = synthetic_groups(next(iter(MIXES)), 16, vocab_size, shrink=32)
    num_parameters, found = bytes_by_stage(options.model, groups, options.deepspeed_config)
    if dist.get_rank() == 0:
        report |= {"parameters": num_parameters, "replicas": dist.get_world_size(), "bytes": found}
        expected = {stage: formula(stage, num_parameters, dist.get_world_size()) for stage in found}
        print_table(
            f"{num_parameters:,} parameters on {dist.get_world_size()} replicas",
            ["ZeRO stage", "MiB a rank", "formula", "of stage 0"],
            [[stage, size / 2**20, expected[stage] / 2**20, size / found[0]] for stage, size in found.items()],
        )
    dist.destroy_process_group()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--deepspeed-config", metavar="FILE", help="as parallel.deepspeed_config")
    parser.set_defaults(threads=1)
