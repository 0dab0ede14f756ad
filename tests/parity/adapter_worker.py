"""What the ranks of the adapters' worlds do: one way of training the same adapters after the other in the same processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megadpo.checkpoint.merged import MemorySource, MergedSource
from megadpo.config.schema import ModelConfig, ObjectiveConfig, ParallelConfig, PipelineScheduleConfig, TrainConfig
from megadpo.data.groups import Group
from megadpo.data.store import GroupStore
from megadpo.model.activations import Activations
from megadpo.parallel.layout import Layout
from tests.parity.worker import Outcome, completed, opened, parts_of

if TYPE_CHECKING:
    from megadpo.model.adapters.spec import AdapterSpec
    from megadpo.model.build import Stage


@dataclass(frozen=True)
class Case:
    """One way of training."""

    layout: Layout = field(default_factory=Layout)
    tokens_per_micro_batch: int = 200
    memory: Activations = field(default_factory=Activations)
    zero_stage: int | None = None
    """Of DeepSpeed; None: Megatron's engine."""
    overlap: bool | None = None
    fusion: bool | None = None
    offload: str = "none"
    """Of the optimizer's state."""
    schedule: PipelineScheduleConfig = field(default_factory=PipelineScheduleConfig)
    dtype: torch.dtype = torch.float32


@dataclass
class AdapterOutcome(Outcome):
    """What a case gave.

    Attributes:
        before, off: log-probs of all responses by the adapters' absence, before and after training.
        num_bytes: of gradients and optimizer state on rank 0.
        num_four_bit_bytes: of weights in 4 bits on rank 0.
        num_frozen_bytes: of all other frozen parameters there.
    """

    before: Tensor = field(default_factory=lambda: torch.empty(0))
    off: Tensor = field(default_factory=lambda: torch.empty(0))
    num_bytes: int = 0
    num_four_bit_bytes: int = 0
    num_frozen_bytes: int = 0


@dataclass(frozen=True)
class Adapted:
    """A model directory with adapters: options as `AdapterConfig` has them, and tensors by PEFT's names (None: new)."""

    model: Path
    options: dict[str, Any]
    tensors: dict[str, Tensor] | None = None
    is_reference: bool = False
    """The reference has the same adapters as they are before training; else none."""
    built: ModelConfig = field(default_factory=ModelConfig)
    """The model's options: in how many bits its frozen weights are."""


def outcomes(
    adapted: Adapted,
    groups: Sequence[Group],
    cases: Sequence[Case],
    num_steps: int = 0,
    objective: ObjectiveConfig | None = None,
) -> list[AdapterOutcome] | None:
    """Every case's outcome on rank 0 (None elsewhere): the first step's loss, margins and gradients, weights after
    `num_steps` steps, log-probs with the adapters off."""
    from megadpo.engine import megatron
    from megadpo.model import offload
    from megadpo.model.heads import logprob as head
    from megadpo.parallel.world import joined_world

    dist.init_process_group("gloo")
    results = []
    with (
        mock.patch.object(head, "TILE_ROWS", 64),
        mock.patch.object(megatron, "BUCKET_ELEMENTS", 3_000),
        mock.patch.object(offload, "MIN_BYTES", 1 << 10),
    ):
        for case in cases:
            with joined_world(case.layout, seed=1):
                try:
                    results.append(_outcome(adapted, groups, case, num_steps, objective or ObjectiveConfig()))
                except BaseException as error:
                    raise RuntimeError(f"{case}: {error}") from error
    whole = completed(results)  # type: ignore[arg-type]
    dist.destroy_process_group()
    return whole  # type: ignore[return-value]


def _outcome(
    adapted: Adapted, groups: Sequence[Group], case: Case, num_steps: int, options: ObjectiveConfig
) -> AdapterOutcome:
    from megadpo.data.batches.packed_dataset import PackedDataset, PackingOptions
    from megadpo.model.four_bit.linear import bytes_in_four_bits
    from megadpo.objectives.coupled import RunningMean
    from megadpo.objectives.objective import Objective
    from megadpo.training.global_batch import pack_global_batch
    from megadpo.training.reference import NoReference, Reference
    from megadpo.training.step import optimizer_step, reduce_metrics

    layout, objective = case.layout, Objective.of(options)
    packing = PackedDataset.of(
        GroupStore.of(groups),
        PackingOptions(
            tokens_per_micro_batch=case.tokens_per_micro_batch,
            num_data_parallel=layout.data,
            stream_multiple=layout.stream_multiple,
            hidden_size=64,
            score_prompts=objective.scores_prompt,
            micro_batches_multiple_of=layout.micro_batches_multiple_of,
            split_pairs=case.schedule.split_pairs,
        ),
    )
    stage, *sources = adapted_stage(adapted, case)
    reference: Reference = NoReference()
    if objective.needs_reference:
        reference = _reference(adapted, case, stage, *sources)
    engine = _engine(stage, case, reference)
    stage.train()
    outcome, running_mean, gradients = AdapterOutcome(), RunningMean(), {}

    def keep_gradients() -> None:
        gradients.update({name: tensor.clone() for name, tensor in engine.gradients()})

    for step in range(max(1, num_steps)):
        batch = pack_global_batch(packing, np.arange(len(groups)), objective)
        keep = keep_gradients if step == 0 else None
        result = optimizer_step(engine, reference, batch, objective, running_mean, 1e-2, on_gradients=keep)
        running_mean = result.running_mean
        outcome.losses.append(reduce_metrics(result.metric_sums, objective)["loss"])
        found = torch.cat([logps.cpu() for logps in result.reference_logps if logps is not None] or [torch.empty(0)])
        if step == 0:
            outcome.parts["gradients"] = parts_of(stage, gradients)
            outcome.loss, outcome.grad_norm, outcome.before = outcome.losses[0], result.grad_norm, found
            both = zip(result.response_sums, result.reference_logps, strict=False)
            ratios = [sums_RS[:, 0] - logps_R for sums_RS, logps_R in both if logps_R is not None]
            outcome.margins = torch.cat([*ratios, torch.empty(0)])
        outcome.off = found
    if num_steps:
        outcome.parts["weights"] = parts_of(stage, {name: tensor for _, name, tensor in engine.state(["weights"])})
    outcome.num_four_bit_bytes = bytes_in_four_bits(stage.models)
    frozen = [p for model in stage.models for p in model.parameters() if not p.requires_grad]
    outcome.num_frozen_bytes = sum(parameter.nbytes for parameter in frozen)
    if case.zero_stage is None:
        outcome.num_bytes = _bytes_of(engine)
    return outcome


def adapted_stage(adapted: Adapted, case: Case) -> tuple[Stage, Any, Any]:
    """The policy's stage on this rank, loaded, and the sources of the model and of what is trained."""
    from megadpo.model.adapters.attach import begin_magnitudes
    from megadpo.model.adapters.beginnings import DECOMPOSED
    from megadpo.model.adapters.decomposed import beginnings
    from megadpo.model.adapters.initial import NewAdapter
    from megadpo.model.build import build_stage
    from megadpo.model.families import shape_of
    from megadpo.model.weights import load_weights

    hf_config, source = opened(adapted.model)
    shape = shape_of(hf_config)
    spec = spec_of(adapted.options, shape)
    trained: Any = NewAdapter(spec, shape, 0, source) if adapted.tensors is None else MemorySource(adapted.tensors)
    original = source
    if spec.init in DECOMPOSED:
        begun = beginnings(spec, source)
        trained = NewAdapter(spec, shape, 0, source, begun)
        source = MergedSource(source, MemorySource(begun), spec, factor=-1.0)
    if case.zero_stage is None:
        stage = build_stage(shape, case.layout, case.dtype, case.memory, options=adapted.built, adapter=spec)
        load_weights(stage, source, trained)
    else:
        from megadpo.engine.deepspeed.engine import policy_stage

        parallel = ParallelConfig(engine="deepspeed", zero_stage=case.zero_stage)
        options = parallel, adapted.built, spec, trained
        stage = policy_stage(shape, source, case.layout, case.dtype, case.memory, *options)
    if adapted.tensors is None and spec.use_dora:
        begin_magnitudes(stage.models)
    return stage, original, trained


def spec_of(options: dict[str, Any], shape: Any) -> AdapterSpec:
    from megadpo.config.schema import AdapterConfig
    from megadpo.model.adapters.spec import resolve

    return resolve(AdapterConfig(kind="lora", **options), shape)


def _reference(adapted: Adapted, case: Case, stage: Stage, source: Any, trained: Any) -> Any:
    from megadpo.model.families import shape_of
    from megadpo.training.models import AdapterFiles
    from megadpo.training.reference import ResidentInterleavedReference, ResidentReference, within_reference

    shape = shape_of(opened(adapted.model)[0])
    own = AdapterFiles(spec_of(adapted.options, shape), trained, is_new=False) if adapted.is_reference else None
    kind = ResidentInterleavedReference if case.schedule.reference == "interleaved" else ResidentReference
    return kind(stage, None, case.schedule, within_reference(stage, shape, case.layout, source, own))


def _engine(stage: Stage, case: Case, reference: Any) -> Any:
    from megadpo.pipeline.select import pipeline_schedule

    train = TrainConfig(learning_rate=1e-2, clip_norm=1.0)
    schedule = pipeline_schedule(case.schedule, reference.interleaved)
    if case.zero_stage is not None:
        from megadpo.engine.deepspeed.engine import ZeroEngine

        return ZeroEngine(stage, train, ParallelConfig(engine="deepspeed", zero_stage=case.zero_stage), schedule)
    from megadpo.engine.megatron import MegatronEngine

    parallel = ParallelConfig(overlap=case.overlap, offload=case.offload, gradient_accumulation_fusion=case.fusion)
    return MegatronEngine(stage, train, parallel, schedule)


def _bytes_of(engine: Any) -> int:
    gradients = sum(buffer.grad_data.nbytes for model in engine.models for buffer in model.buffers)
    states = [state for part in engine.optimizers for state in part.optimizer.state.values()]
    moments = sum(state[kind].nbytes for state in states for kind in ("exp_avg", "exp_avg_sq"))
    return gradients + moments
