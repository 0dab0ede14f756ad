"""The frozen reference: a second model run beside the policy, or its log-probs computed once and kept on disk, or both:
run beside the policy until every log-prob is on disk."""

from __future__ import annotations

import functools
import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megadpo.config.schema import ModelConfig, PipelineScheduleConfig
from megadpo.data.batches.bin_packing import IntArray
from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.data.batches.packed_dataset import PackedDataset
from megadpo.data.rows.dataset import cache_root
from megadpo.data.store import GroupStore
from megadpo.model.build import Stage, build_stage
from megadpo.model.families import TensorSource
from megadpo.model.shape import ModelShape
from megadpo.model.weights import load_weights
from megadpo.parallel.layout import Layout
from megadpo.parallel.zero3 import own_part
from megadpo.pipeline.interleaved_reference import InterleavedReference
from megadpo.pipeline.select import pipeline_schedule
from megadpo.platform.device import compute_device
from megadpo.training.reference_cache import LogpTable, read_logps, write_logps
from megadpo.training.score import response_logps
from megadpo.training.setup import ModelFiles, RunSetup, scoring_packing

Reference = Callable[[Sequence[MicroBatch]], Sequence[Tensor | None]]
"""Micro-batches -> reference log-probs [R] of each, float64, on the last stage (elsewhere it may be empty); None: none."""

CACHE_VERSION = 3


@dataclass
class References:
    """The reference for the training pairs and for the held-out ones, and its model where it is resident.

    Attributes:
        table: where the model's log-probs of the training pairs are kept, until all are; the model goes then.
        interleaved: the reference of the training pairs where it runs among the policy's operations; None: `train` runs it
            before them.
    """

    train: Reference
    eval: Reference | None
    stage: Stage | None = None
    interleaved: InterleavedReference | None = None
    table: LogpTable | None = None

    def train_for(self, numbers: IntArray) -> Reference:
        """The reference for a step of the training groups `numbers`: looked up where all of them are known."""
        if self.table is not None and self.table.knows(numbers):
            return precomputed(self.table.logps_R, self.table.groups)
        return self.train

    def remember(self, numbers: IntArray, micro_batches: Sequence[MicroBatch], logps: Sequence[Tensor | None]) -> None:
        """After a step: keep what the model has computed, and let it go when nothing is left to compute; collective."""
        if self.table is None or self.table.knows(numbers):
            return
        self.table.add(numbers, micro_batches, logps)
        if self.table.is_whole:
            self.train, self.stage = precomputed(self.table.logps_R, self.table.groups), None
            self.table = None
            gc.collect()  # modules refer to each other in circles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def write(self) -> None:
        """Put on disk what is kept in memory only."""
        if self.table is not None:
            self.table.write()

    def move(self, policy: Stage, alpha: float) -> None:
        """TR-DPO (arXiv:2404.09656, eq. 2): reference = alpha policy + (1 - alpha) reference, each rank its own shard."""
        assert self.stage is not None
        with torch.no_grad():
            for name, (parameter, _) in self.stage.parameters.items():
                own_part(parameter).lerp_(own_part(policy.parameters[name][0]).detach(), alpha)


def build_references(plan: RunSetup, say: Callable[[str], None]) -> References:
    """What the configuration asks for, ready to be asked.

    Args:
        say: tells the user a sentence.
    """
    mode, ld_alpha = plan.config.reference.mode, plan.config.objective.ld_alpha
    options = plan.config.model

    @functools.cache  # training and held-out pairs may both need it
    def frozen() -> Stage:
        if plan.config.parallel.engine == "deepspeed" and plan.config.parallel.zero_stage == 3:
            from megadpo.engine.deepspeed.engine import frozen_sharded_stage

            return frozen_sharded_stage(
                plan.reference.shape, plan.reference.source, plan.layout, plan.dtype, plan.config.parallel, options
            )
        return frozen_stage(plan.reference.shape, plan.layout, plan.dtype, plan.reference.source, options)

    if mode == "none":
        return References(absent, absent)
    if mode == "resident":
        stage, schedule = frozen(), plan.config.schedule
        reference = resident(stage, ld_alpha, schedule)
        interleaved = InterleavedReference(stage.models, ld_alpha) if schedule.reference == "interleaved" else None
        return References(reference, reference, stage, interleaved)
    if mode == "precomputed":
        train = _precomputed_for(plan, plan.train, frozen, say)
        return References(train, None if plan.eval is None else _precomputed_for(plan, plan.eval, frozen, say))
    # The model goes with the first epoch, so that held-out pairs are scored before it.
    held_out = None if plan.eval is None else _precomputed_for(plan, plan.eval, frozen, say)
    table = LogpTable(_cache_path(plan, plan.train), plan.train.groups, say)
    num_responses = len(table.logps_R)
    say(f"reference log-probs of {num_responses - table.num_unknown:,} of {num_responses:,} responses read from the cache")
    if table.is_whole:
        return References(precomputed(table.logps_R, table.groups), held_out)
    return References(resident(frozen(), ld_alpha, plan.config.schedule), held_out, frozen(), table=table)


def _cache_path(plan: RunSetup, packing: PackedDataset) -> Path:
    arithmetic = f"{plan.dtype}, FP8" if plan.config.model.fp8 else str(plan.dtype)
    key = cache_key(model_digest(plan.reference), packing.groups.digest, arithmetic, plan.config.objective.ld_alpha)
    return cache_root(plan.config.data.cache_dir) / "reference" / f"{key}.safetensors"


def _precomputed_for(
    plan: RunSetup, packing: PackedDataset, frozen: Callable[[], Stage], say: Callable[[str], None]
) -> Reference:
    """Reference log-probs of a data set, from the cache or computed now in larger micro-batches."""
    config = plan.config
    larger = scoring_packing(config, packing.groups, plan.layout, plan.reference.shape)
    logps_R, from_cache = cached_logps(_cache_path(plan, packing), larger, frozen, config.objective.ld_alpha)
    say(f"reference log-probs of {len(packing.groups):,} rows {'read from the cache' if from_cache else 'computed'}")
    return precomputed(logps_R, packing.groups)


def frozen_stage(
    shape: ModelShape, layout: Layout, dtype: torch.dtype, source: TensorSource, options: ModelConfig | None = None
) -> Stage:
    """The reference model's stage on this rank, loaded, without gradients."""
    stage = build_stage(shape, layout, dtype, options=options)
    load_weights(stage, source)
    for model in stage.models:
        model.requires_grad_(False)
        model.eval()
    stage.configure_head(statistics=("logp",))
    return stage


def absent(micro_batches: Sequence[MicroBatch]) -> list[None]:
    """The reference of objectives that read none."""
    return [None] * len(micro_batches)


def resident(stage: Stage, ld_alpha: float | None = None, schedule: PipelineScheduleConfig | None = None) -> Reference:
    """A reference that runs through the same layers, layout and micro-batches as the policy: equal weights give
    bit-equal log-probs."""
    forward_only = pipeline_schedule(schedule).forward_only
    return lambda micro_batches: [sums_RS[:, 0] for sums_RS in forward_only(stage.models, micro_batches, ld_alpha)]


def precomputed(logps_R: np.ndarray, groups: GroupStore) -> Reference:
    """A reference that looks up what was computed before; `logps_R` has every response of `groups`, in order."""
    table_R = torch.from_numpy(logps_R).to(compute_device())

    def look_up(micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        response_ids = [torch.from_numpy(groups.response_ids_of(micro_batch.group_ids)) for micro_batch in micro_batches]
        return [table_R[response_ids_R.to(table_R.device)] for response_ids_R in response_ids]

    return look_up


def model_digest(model: ModelFiles) -> str:
    """blake2b over the contents of config.json and of every weights file: all that decides what the model computes."""
    hasher = hashlib.blake2b(digest_size=20)
    for path in (model.huggingface / "config.json", *sorted(Path(model.path).glob("*.safetensors"))):
        hasher.update(path.name.encode())
        with path.open("rb") as stream:
            while block := stream.read(1 << 22):
                hasher.update(block)
    return hasher.hexdigest()


def cache_key(model_digest: str, groups_digest: str, arithmetic: str, ld_alpha: float | None = None) -> str:
    """A name for everything that changes a reference log-prob.

    The groups' digest covers rows, tokenizer, template and truncation, since all of them act through the token ids.
    """
    parts: dict[str, Any] = {"version": CACHE_VERSION, "model": model_digest, "groups": groups_digest}
    parts |= {"dtype": arithmetic, "ld_alpha": ld_alpha}
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def cached_logps(
    path: Path, packing: PackedDataset, build: Callable[[], Stage], ld_alpha: float | None = None
) -> tuple[np.ndarray, bool]:
    """Reference log-probs [R] of all responses of `packing` from the cache, or computed and cached; collective.

    Rank 0 reads and writes the cache; the values reach the others over the process group.

    Args:
        path: the cache's file.
        build: makes the reference's stage; called only where there is no such file.

    Returns:
        The log-probs, and whether they came from the cache.
    """
    logps_R = np.zeros(packing.groups.num_responses)
    found = torch.zeros((), dtype=torch.int64, device=compute_device())
    if dist.get_rank() == 0 and path.is_file():
        logps_R = read_logps(path, len(logps_R))
        found += 1
    dist.broadcast(found, 0)
    if found:
        shared = torch.from_numpy(logps_R).to(compute_device())
        dist.broadcast(shared, 0)
        return shared.cpu().numpy(), True
    for numbers, values in response_logps(build(), packing, ld_alpha):
        first, end = packing.groups.response_offsets_G[[numbers.start, numbers.stop]]
        logps_R[first:end] = values
    if dist.get_rank() == 0:
        write_logps(path, {"logps_R": logps_R})
    return logps_R, False
