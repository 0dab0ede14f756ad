"""What the ranks of the DeepSpeed tests do: one engine and layout after the other in the same processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from megadpo.config.schema import ObjectiveConfig, ParallelConfig, TrainConfig
from megadpo.data.groups import Group
from megadpo.data.store import GroupStore
from megadpo.model.activations import Activations
from megadpo.parallel.layout import Layout
from megadpo.platform.device import communication_backend
from tests.parity import worker
from tests.parity.worker import completed, opened, parts_of

if TYPE_CHECKING:
    from megadpo.pipeline.base import PipelineSchedule


@dataclass
class Outcome(worker.Outcome):
    """And the optimizer, as the engine describes it, and the number of files of each model offloaded to NVMe."""

    optimizer: str = ""
    num_files: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """An engine in a layout; zero_stage None: Megatron's."""

    layout: Layout
    zero_stage: int | None = None
    tokens_per_micro_batch: int = 160
    recompute: str = "none"
    offload: str = "none"
    offload_dir: str | None = None
    deepspeed_config: str | None = None
    dtype: torch.dtype = torch.float32
    clip_norm: float = 1.0
    objective: str = "sigmoid"
    cpu_adam: bool = False
    memory: Activations | None = None
    """Instead of `recompute`."""
    router_replay: bool = False

    @property
    def activations(self) -> Activations:
        return self.memory or Activations(self.recompute)

    def __str__(self) -> str:
        engine = "Megatron" if self.zero_stage is None else f"ZeRO-{self.zero_stage}"
        rest = f"{self.tokens_per_micro_batch} tokens, activations {self.activations}, offload {self.offload}"
        return f"{engine}, {self.layout}, {rest}, clip {self.clip_norm}, {self.dtype}, {self.objective}"

    @property
    def parallel(self) -> ParallelConfig:
        stage, offload = self.zero_stage or 0, self.offload
        options = {"offload": offload, "offload_dir": self.offload_dir, "deepspeed_config": self.deepspeed_config}
        return ParallelConfig(engine="deepspeed", zero_stage=stage, **options)


def outcomes(
    model: Path, reference: Path, groups: Sequence[Group], cases: Sequence[Case], num_steps: int = 3
) -> list[Outcome] | None:
    """Every case's outcome on rank 0: first-step loss, norm, gradients and margins, weights after `num_steps` steps."""
    from megadpo.model import offload
    from megadpo.model.heads import logprob as head
    from megadpo.parallel.world import joined_world

    dist.init_process_group(communication_backend())
    results = []
    with mock.patch.object(head, "TILE_ROWS", 64), mock.patch.object(offload, "MIN_BYTES", 1 << 10):
        for case in cases:
            with joined_world(case.layout, seed=1):
                try:
                    results.append(_outcome(model, reference, groups, case, num_steps))
                except BaseException as error:
                    raise RuntimeError(str(case)) from error
    whole = completed(results)
    dist.barrier()
    dist.destroy_process_group()
    return whole  # type: ignore[return-value]


def _outcome(model: Path, reference: Path, groups: Sequence[Group], case: Case, num_steps: int) -> Outcome:
    from megadpo.checkpoint.reward_model import as_reward_model
    from megadpo.data.batches.packed_dataset import PackedDataset, PackingOptions
    from megadpo.model.routes import Routes
    from megadpo.objectives.coupled import RunningMean
    from megadpo.objectives.objective import Objective
    from megadpo.training.global_batch import pack_global_batch
    from megadpo.training.reference import NoReference, Reference, ResidentReference
    from megadpo.training.step import optimizer_step, reduce_metrics
    from tests.parity.remembered import RememberedReference

    layout, (hf_config, source) = case.layout, opened(model)
    objective = Objective.of(ObjectiveConfig(loss_type=case.objective))
    if objective.has_reward_head:
        with_head = as_reward_model(hf_config, source, model, seed=3)
        hf_config, source = with_head.config, with_head.source
    packing = PackedDataset.of(
        GroupStore.of(groups),
        PackingOptions(
            tokens_per_micro_batch=case.tokens_per_micro_batch,
            num_data_parallel=layout.data,
            stream_multiple=layout.stream_multiple,
            hidden_size=64,
            micro_batches_multiple_of=layout.micro_batches_multiple_of,
        ),
    )
    run_reference: Reference = NoReference()
    if objective.needs_reference:
        routes = Routes(hf_config.num_local_experts) if case.router_replay else None
        run_reference = ResidentReference(frozen(case, *opened(reference)), routes=routes)
    engine = make_engine(case, hf_config, source)
    engine.routes = run_reference.routes
    engine.stage.train()
    outcome, running_mean, gradients = Outcome(optimizer=engine.describe()["optimizer"]), RunningMean(), {}

    def keep_gradients() -> None:
        gradients.update({name: tensor.clone() for name, tensor in engine.gradients()})

    step_reference = run_reference
    for step in range(num_steps):
        batch = pack_global_batch(packing, np.arange(len(groups)), objective)
        keep = keep_gradients if step == 0 else None
        result = optimizer_step(engine, step_reference, batch, objective, running_mean, 1e-3, on_gradients=keep)
        running_mean = result.running_mean
        step_reference = RememberedReference(result.reference_logps)
        if step == 0:
            outcome.parts["gradients"] = parts_of(engine.stage, gradients)
            outcome.grad_norm = result.grad_norm
            outcome.router = engine.router_metrics()
            outcome.loss = reduce_metrics(result.metric_sums, objective)["loss"]
            both = zip(result.response_sums, result.reference_logps, strict=False)
            ratios = [sums_RS[:, 0] - reference_R for sums_RS, reference_R in both if reference_R is not None]
            outcome.margins = torch.cat([ratio_R[::2] - ratio_R[1::2] for ratio_R in ratios] or [torch.empty(0)])
    outcome.parts["weights"] = parts_of(engine.stage, {name: tensor for _, name, tensor in engine.state(["weights"])})
    if case.offload_dir:
        own = Path(case.offload_dir) / f"rank{dist.get_rank()}"
        outcome.num_files = {role: len(list((own / role).rglob("*.swp"))) for role in ("policy", "reference")}
    outcome.num_bytes_moved = 0 if engine.stage.offloader is None else engine.stage.offloader.num_bytes_moved
    outcome.num_recomputed = 0 if engine.stage.recomputer is None else engine.stage.recomputer.num_recomputed
    return outcome


def make_engine(case: Case, hf_config: Any, source: Any, schedule: PipelineSchedule | None = None) -> Any:
    """The case's engine on a loaded stage, by Megatron's schedule where none is given."""
    from megadpo.model.build import build_stage
    from megadpo.model.families import shape_of
    from megadpo.model.weights import load_weights

    train = TrainConfig(learning_rate=1e-3, clip_norm=case.clip_norm, weight_decay=0.1)
    if case.zero_stage is None:
        from megadpo.engine.megatron import MegatronEngine

        stage = build_stage(shape_of(hf_config), case.layout, case.dtype, case.activations)
        load_weights(stage, source)
        return MegatronEngine(stage, train, schedule=schedule)
    from megadpo.engine.deepspeed import engine as deepspeed
    from megadpo.engine.deepspeed.engine import ZeroEngine, policy_stage

    stage = policy_stage(shape_of(hf_config), source, case.layout, case.dtype, case.activations, case.parallel)
    if case.cpu_adam:
        return ZeroEngine(stage, train, case.parallel, schedule)
    with mock.patch.object(deepspeed, "cpu_adam", lambda: None):  # as where it does not build
        return ZeroEngine(stage, train, case.parallel, schedule)


def frozen(case: Case, hf_config: Any, source: Any) -> Any:
    """The case's frozen reference, sharded where the policy is."""
    from megadpo.model.families import shape_of
    from megadpo.training.reference import frozen_stage

    if case.zero_stage == 3:
        from megadpo.engine.deepspeed.engine import frozen_sharded_stage

        return frozen_sharded_stage(shape_of(hf_config), source, case.layout, case.dtype, case.parallel)
    return frozen_stage(shape_of(hf_config), case.layout, case.dtype, source)
