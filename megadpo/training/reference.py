"""The frozen reference: a second model that is resident with the policy, or its log-probs computed once and kept on disk, or
both: resident until every log-prob is on disk."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megadpo.config.schema import ModelConfig, PipelineScheduleConfig
from megadpo.console.activity import activity
from megadpo.data.batches.bin_packing import IntArray
from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.data.batches.packed_dataset import PackedDataset
from megadpo.data.rows.dataset import cache_root
from megadpo.data.store import GroupStore
from megadpo.model.adapters.attach import adapters_off, reference_adapters
from megadpo.model.build import Stage, add_reference_adapters, build_stage
from megadpo.model.families import TensorSource
from megadpo.model.families.fill import fill_shard
from megadpo.model.neftune import without_noise
from megadpo.model.router_load import watch_of
from megadpo.model.routes import Routes
from megadpo.model.shape import ModelShape
from megadpo.model.weights import keep_originals, load_weights
from megadpo.parallel.context import on_device
from megadpo.parallel.layout import Layout
from megadpo.parallel.zero3 import own_part
from megadpo.pipeline.interleaved_reference import InterleavedReference
from megadpo.pipeline.operations import Within
from megadpo.pipeline.select import pipeline_schedule
from megadpo.platform.device import compute_device
from megadpo.training.console import log
from megadpo.training.global_batch import GlobalBatch
from megadpo.training.inputs import quantization_text
from megadpo.training.models import AdapterFiles, ModelFiles
from megadpo.training.non_finite import require_finite_logps
from megadpo.training.reference_cache import LogpTable, read_logps, write_logps
from megadpo.training.score import response_logps
from megadpo.training.setup import RunSetup, scoring_packing

CACHE_VERSION = 4


class Reference:
    """The frozen reference of a data set: gives each step its log-probs. The classes below are the kinds of it.

    Each list of log-probs has one entry a micro-batch: [R] in float64 on last stages (elsewhere the list may be empty), None
    where there is no reference.

    Attributes:
        stage: the reference's model on this rank while it is resident; else None.
        interleaved: what the engine's schedule runs among the policy's operations; else None.
        routes: where it notes which experts it sends tokens to, for the policy's passes; else None.
    """

    stage: Stage | None = None
    interleaved: InterleavedReference | None = None
    routes: Routes | None = None

    def logps(self, micro_batches: Sequence[MicroBatch]) -> Sequence[Tensor | None]:
        """Log-probs of micro-batches, at once. Collective."""
        raise NotImplementedError

    def begin(self, group_ids: IntArray, micro_batches: Sequence[MicroBatch]) -> Sequence[Tensor | None]:
        """Log-probs for a step on the groups `group_ids`, of which `micro_batches` are this replica's. Collective.

        An interleaved reference fills the list while the policy runs: each entry is there when the policy's log-probs of
        the micro-batch are.
        """
        return self.logps(micro_batches)

    def complete(self) -> None:
        """Have the whole list there now; collective."""

    def run_ahead(self, following: Callable[[], GlobalBatch]) -> None:
        """After `begin`: forwards for the step after this one, whose batch `following` gives, may run in this one."""

    def finish(self) -> None:
        """The step is done; collective."""

    def write(self) -> None:
        """Put on disk what is kept in memory only."""


class NoReference(Reference):
    """For objectives that read none."""

    def logps(self, micro_batches: Sequence[MicroBatch]) -> list[None]:
        return [None] * len(micro_batches)


class ResidentReference(Reference):
    """Runs through the same layers, layout and micro-batches as the policy: equal weights give bit-equal log-probs.

    With adapters it is the policy's own stage, whose forwards run `within` a context that turns them off, or to others.
    """

    def __init__(
        self,
        stage: Stage,
        ld_alpha: float | None = None,
        schedule: PipelineScheduleConfig | None = None,
        within: Within = contextlib.nullcontext,
        routes: Routes | None = None,
    ) -> None:
        self.stage: Stage = stage
        self.routes = routes
        self._ld_alpha, self._schedule, self._within = ld_alpha, pipeline_schedule(schedule), within

    def logps(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        watch = None
        if self.routes is not None:
            records = self.routes.begin(micro_batches)
            watch = watch_of(self.stage.models[0].config, compute_device(), records=records)
        with self._within():
            sums = self._schedule.forward_only(self.stage.models, micro_batches, self._ld_alpha, watch)
        return [sums_RS[:, 0] for sums_RS in sums]


class ResidentInterleavedReference(ResidentReference):
    """A resident reference whose forwards run among the policy's operations, some of them a step ahead.

    The engine's schedule has to be given its `interleaved`.
    """

    interleaved: InterleavedReference

    def __init__(
        self,
        stage: Stage,
        ld_alpha: float | None = None,
        schedule: PipelineScheduleConfig | None = None,
        within: Within = contextlib.nullcontext,
    ) -> None:
        super().__init__(stage, ld_alpha, schedule, within)
        self.interleaved = InterleavedReference(stage.models, ld_alpha, within)

    def begin(self, group_ids: IntArray, micro_batches: Sequence[MicroBatch]) -> list[Tensor | None]:
        return self.interleaved.begin(micro_batches)

    def complete(self) -> None:
        self.interleaved.complete()

    def run_ahead(self, following: Callable[[], GlobalBatch]) -> None:
        self.interleaved.run_ahead(on_device(following().micro_batches))


class PrecomputedReference(Reference):
    """Looks up what was computed before.

    Args:
        logps_R: float64, of every response of `groups`, in order.
    """

    def __init__(self, logps_R: np.ndarray, groups: GroupStore) -> None:
        self._table_R, self._groups = torch.from_numpy(logps_R).to(compute_device()), groups

    def logps(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        responses = [torch.from_numpy(self._groups.response_ids_of(micro_batch.group_ids)) for micro_batch in micro_batches]
        return [self._table_R[responses_R.to(self._table_R.device)] for responses_R in responses]


class CachedReference(Reference):
    """Resident until it has computed every response; then its model goes, and log-probs are looked up."""

    def __init__(self, resident: ResidentReference, table: LogpTable) -> None:
        self.stage = resident.stage
        self._resident: ResidentReference | None = resident
        self._table = table
        self._known: PrecomputedReference | None = None
        self._computed: tuple[IntArray, Sequence[MicroBatch], Sequence[Tensor | None]] | None = None

    def begin(self, group_ids: IntArray, micro_batches: Sequence[MicroBatch]) -> Sequence[Tensor | None]:
        self._computed = None
        if self._resident is None or self._table.knows(group_ids):
            known = self._known or PrecomputedReference(self._table.logps_R, self._table.groups)
            return known.logps(micro_batches)
        logps = self._resident.logps(micro_batches)
        self._computed = group_ids, micro_batches, logps
        return logps

    def finish(self) -> None:
        if self._computed is None:
            return
        self._table.add(*self._computed)
        self._computed = None
        if self._table.is_whole:
            self._known, self._resident = PrecomputedReference(self._table.logps_R, self._table.groups), None
            self.stage = None
            gc.collect()  # modules refer to each other in circles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def write(self) -> None:
        self._table.write()


@dataclass(frozen=True)
class References:
    """The reference for the training groups, and for those of each held-out set."""

    train: Reference
    eval: Mapping[str, Reference]

    def move(self, policy: Stage, alpha: float) -> None:
        """TR-DPO (arXiv:2404.09656, eq. 2): reference = alpha policy + (1 - alpha) reference, each rank its own shard."""
        assert self.train.stage is not None
        with torch.no_grad():
            for name, (parameter, _) in self.train.stage.held.items():
                own_part(parameter).lerp_(own_part(policy.held[name][0]).detach(), alpha)


def build_references(setup: RunSetup, policy: Callable[[], Stage]) -> References:
    """The references of `reference.mode`; collective.

    Args:
        policy: gives the policy's stage, whose adapters a reference may turn off.
    """
    mode, ld_alpha, schedule = setup.config.reference.mode, setup.config.objective.ld_alpha, setup.config.schedule
    options = setup.config.model
    kind: Callable[..., ResidentReference]
    kind = ResidentInterleavedReference if schedule.reference == "interleaved" else ResidentReference
    if setup.config.reference.router_replay:
        assert setup.reference.shape.experts is not None, "refused when the model is opened"
        kind = functools.partial(ResidentReference, routes=Routes(setup.reference.shape.experts.count))

    @functools.cache  # training and held-out groups may both need it
    def frozen() -> Stage:
        if setup.config.parallel.engine == "deepspeed" and setup.config.parallel.zero_stage == 3:
            from megadpo.engine.deepspeed.engine import frozen_sharded_stage

            return frozen_sharded_stage(
                setup.reference.shape, setup.reference.source, setup.layout, setup.dtype, setup.config.parallel, options
            )
        return frozen_stage(setup.reference.shape, setup.layout, setup.dtype, setup.reference.source, options)

    def within() -> Within:
        model = setup.policy
        return within_reference(policy(), model.shape, setup.layout, model.source, setup.reference_adapter)

    if mode == "none":
        return References(NoReference(), dict.fromkeys(setup.eval, NoReference()))
    if mode == "adapter":
        reference = kind(policy(), ld_alpha, schedule, within())
        return References(reference, dict.fromkeys(setup.eval, reference))
    if mode == "resident":
        reference = kind(frozen(), ld_alpha, schedule)
        return References(reference, dict.fromkeys(setup.eval, reference))
    if mode == "precomputed":
        train = _precomputed_for(setup, setup.train, frozen)
        return References(train, {name: _precomputed_for(setup, packing, frozen) for name, packing in setup.eval.items()})
    # The model goes with the first epoch, so that held-out groups are scored before it.
    held_out: dict[str, Reference] = {name: _precomputed_for(setup, packing, frozen) for name, packing in setup.eval.items()}
    table = LogpTable(_cache_path(setup, setup.train), setup.train.groups, log)
    num_responses = len(table.logps_R)
    log(f"reference log-probs of {num_responses - table.num_unknown:,} of {num_responses:,} responses read from the cache")
    if table.is_whole:
        return References(PrecomputedReference(table.logps_R, table.groups), held_out)
    if setup.adapter is not None and setup.reference is setup.policy:  # the same bits without a second model
        resident = ResidentReference(policy(), ld_alpha, schedule, within())
    else:
        resident = ResidentReference(frozen(), ld_alpha, schedule)
    return References(CachedReference(resident, table), held_out)


def within_reference(
    policy: Stage, shape: ModelShape, layout: Layout, source: TensorSource, adapter: AdapterFiles | None = None
) -> Within:
    """Makes the context in which the policy's stage is the reference: its adapters off, or others in their place.

    Args:
        source: the model's tensors: for those that the policy trains whole, as they were.
        adapter: the others, loaded here.
    """
    turned = adapters_off
    keep_originals(policy, source, None if adapter is None else adapter.source)
    if adapter is not None:
        turned = reference_adapters
        for buffer, shard in add_reference_adapters(policy, shape, layout, adapter.spec):
            fill_shard(shard, adapter.source, buffer)
        adapter.source.release()

    @contextlib.contextmanager
    def within() -> Iterator[None]:
        with turned(policy.models), policy.logps_only(), without_noise(policy):
            yield

    return within


def _cache_path(setup: RunSetup, packing: PackedDataset) -> Path:
    options = setup.config.model
    arithmetic = f"{setup.dtype}, FP8" if options.fp8 else str(setup.dtype)
    if options.quantization != "none":
        arithmetic += f", {quantization_text(options)}"
    key = cache_key(reference_digest(setup.reference), packing.groups.digest, arithmetic, setup.config.objective.ld_alpha)
    return cache_root(setup.config.data.cache_dir) / "reference" / f"{key}.safetensors"


def _precomputed_for(setup: RunSetup, packing: PackedDataset, frozen: Callable[[], Stage]) -> PrecomputedReference:
    """Reference log-probs of a data set, from the cache or computed now in larger micro-batches."""
    config = setup.config
    larger = scoring_packing(config, packing.groups, setup.layout, setup.reference.shape)
    logps_R, from_cache = cached_logps(_cache_path(setup, packing), larger, frozen, config.objective.ld_alpha)
    log(f"reference log-probs of {len(packing.groups):,} rows {'read from the cache' if from_cache else 'computed'}")
    return PrecomputedReference(logps_R, packing.groups)


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


def reference_digest(model: ModelFiles) -> str:
    """blake2b over the names and all bytes of the files that decide what the model computes."""
    hasher = hashlib.blake2b(digest_size=20)
    with activity("hashing the reference's files", sum(path.stat().st_size for path in model.files), "bytes") as hashing:
        for path in model.files:
            hasher.update(path.name.encode())
            with path.open("rb") as stream:
                while block := stream.read(1 << 22):
                    hasher.update(block)
                    hashing.advance(len(block))
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
        build: makes the reference's stage; called only where there is no such file, or a damaged one.

    Returns:
        The log-probs, and whether they came from the cache.
    """
    logps_R = np.zeros(packing.groups.num_responses)
    found = torch.zeros((), dtype=torch.int64, device=compute_device())
    if dist.get_rank() == 0 and (cached_R := read_logps(path, len(logps_R), log)) is not None:
        logps_R = cached_R
        found += 1
    dist.broadcast(found, 0)
    if found:
        shared = torch.from_numpy(logps_R).to(compute_device())
        dist.broadcast(shared, 0)
        return shared.cpu().numpy(), True
    for group_ids, values in response_logps(build(), packing, ld_alpha, telling="computing the reference's log-probs"):
        first, end = packing.groups.response_offsets_G[[group_ids.start, group_ids.stop]]
        require_finite_logps(packing.groups, range(first, end), values)
        logps_R[first:end] = values
    if dist.get_rank() == 0:
        try:
            write_logps(path, {"logps_R": logps_R})
        except OSError as error:  # this run has them in memory
            log(f"warning: the reference cache {path} cannot be written ({error}); going on without")
    return logps_R, False
