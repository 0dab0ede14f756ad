"""What the ranks of the parity worlds do: one layout after the other in the same processes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megadpo.config.schema import ModelConfig, ObjectiveConfig, ParallelConfig, PipelineScheduleConfig, TrainConfig
from megadpo.data.groups import Group
from megadpo.data.store import GroupStore
from megadpo.model.activations import Activations
from megadpo.parallel.layout import Layout
from megadpo.platform.device import communication_backend

if TYPE_CHECKING:
    from megadpo.model.build import Stage
    from megadpo.model.families import TensorSource


@dataclass(frozen=True)
class Case:
    """One way of computing the same thing."""

    layout: Layout
    share_prompts: bool = True
    tokens_per_micro_batch: int = 400
    recompute: str = "none"
    router_aux_coef: float = 0.0
    router_bias_update_rate: float = 0.0
    memory: Activations | None = None
    """Instead of `recompute`."""
    overlap: bool | None = None
    offload: str = "none"
    """Of the optimizer's state."""
    fusion: bool | None = None
    """As `parallel.gradient_accumulation_fusion`."""
    gradient_dtype: str = "fp32"
    moments_dtype: str = "fp32"
    model: ModelConfig = field(default_factory=ModelConfig)
    """What it asks of kernels and layers, of the policy and the reference."""
    schedule: PipelineScheduleConfig = field(default_factory=PipelineScheduleConfig)
    router_replay: bool = False

    @property
    def activations(self) -> Activations:
        return self.memory or Activations(self.recompute)

    def __str__(self) -> str:
        shared = "shared" if self.share_prompts else "unshared"
        rest = f"{self.tokens_per_micro_batch} tokens, activations {self.activations}, schedule {self.schedule}"
        return f"{self.layout}, {shared}, {rest}"


@dataclass(frozen=True)
class Part:
    """What a rank has of a whole tensor: from `start` on along `axis`, float32."""

    name: str
    axis: int
    start: int
    values: np.ndarray


@dataclass
class Outcome:
    """What a case gave, under Hugging Face names, whole tensors."""

    logps: Tensor = field(default_factory=lambda: torch.empty(0))
    loss: float = 0.0
    losses: list[float] = field(default_factory=list)
    margins: Tensor = field(default_factory=lambda: torch.empty(0))
    grad_norm: float = 0.0
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    model_weights: dict[str, Tensor] = field(default_factory=dict)
    router: dict[str, float] = field(default_factory=dict)
    num_bytes_moved: int = 0
    num_recomputed: int = 0
    """By `train.recompute: small`."""
    num_bytes_of_moments: int = 0
    num_bytes_of_gradients: int = 0
    """Both on rank 0."""
    parts: dict[str, list[Part]] = field(default_factory=dict)
    """What this rank has of a field's tensors, until all cases are done and `completed` puts them together."""


def outcomes(
    model: Path,
    reference: Path,
    groups: Sequence[Group],
    cases: Sequence[Case],
    num_steps: int = 0,
    dtype: torch.dtype = torch.float32,
    objective: ObjectiveConfig | None = None,
    tile_rows: int = 64,
    scores: bool = True,
    backend: str | None = None,
) -> list[Outcome] | None:
    """Every case's outcome on rank 0 (None elsewhere): first-step loss and gradients, weights after `num_steps` steps.

    Without `scores` the log-probs are left out, which are scored outside of a step.
    """
    from megadpo.engine import megatron
    from megadpo.model import offload
    from megadpo.model.heads import logprob as head
    from megadpo.parallel.world import joined_world

    dist.init_process_group(backend or communication_backend())
    results = []
    with (
        mock.patch.object(head, "TILE_ROWS", tile_rows),  # several tiles and a ragged last one, even at these sizes
        mock.patch.object(offload, "MIN_BYTES", 1 << 10),
        mock.patch.object(megatron, "BUCKET_ELEMENTS", 20_000),
    ):
        for case in cases:
            with joined_world(case.layout, seed=1):
                options = objective or ObjectiveConfig()
                results.append(_outcome(model, reference, groups, case, num_steps, dtype, options, scores))
    whole = completed(results)
    dist.destroy_process_group()
    return whole


def outcomes_of_models(
    jobs: Sequence[tuple[Path, Path, Sequence[Case]]], groups: Sequence[Group], objective: ObjectiveConfig
) -> list[list[Outcome]] | None:
    """[model][case] on rank 0: of each policy and reference, every case's log-probs, first-step loss and gradients."""
    from megadpo.parallel.world import joined_world

    dist.init_process_group(communication_backend())
    results = []
    for layout in dict.fromkeys(case.layout for _, _, cases in jobs for case in cases):
        with joined_world(layout, seed=1):
            for number, (model, reference, cases) in enumerate(jobs):
                for case in cases:
                    if case.layout == layout:
                        outcome = _outcome(model, reference, groups, case, 0, torch.float32, objective, scores=True)
                        results.append((number, cases.index(case), outcome))
    completed_ones = completed([outcome for _, _, outcome in results])
    dist.destroy_process_group()
    if completed_ones is None:
        return None
    by_job: list[dict[int, Outcome]] = [{} for _ in jobs]
    for (number, place, _), outcome in zip(results, completed_ones, strict=True):
        by_job[number][place] = outcome
    return [[found[place] for place in sorted(found)] for found in by_job]


def outcomes_of_objectives(
    model: Path,
    reference: Path,
    groups: dict[str, Sequence[Group]],
    cases: Sequence[Case],
    objectives: Sequence[ObjectiveConfig],
    chosen: Sequence[Sequence[int]] | None = None,
) -> list[list[Outcome]] | None:
    """[case][objective] on rank 0: each objective's first-step loss and gradients, and the weights after one step.

    `chosen` has, for each case, the numbers of the objectives that are tried in it; None: all are in each. `groups` has
    some for each kind of rows, and "numbered" pairs for objectives that read what rows say of them.
    """
    from megadpo.objectives.specs import reading_of

    def read_by(objective: ObjectiveConfig) -> Sequence[Group]:
        reading = reading_of(objective)
        return groups["numbered" if reading.row_values else reading.kind]

    from megadpo.parallel.world import joined_world

    dist.init_process_group("gloo")
    results = []
    for case, numbers in zip(cases, chosen or [range(len(objectives))] * len(cases), strict=True):
        with joined_world(case.layout, seed=1):
            some = [objectives[number] for number in numbers]
            results.append([_outcome(model, reference, read_by(o), case, 1, torch.float32, o) for o in some])
    whole = completed([outcome for of_case in results for outcome in of_case])
    dist.destroy_process_group()
    if whole is None:
        return None
    following = iter(whole)
    return [list(itertools.islice(following, len(of_case))) for of_case in results]


@functools.cache
def opened(model: Path) -> tuple[Any, TensorSource]:
    """The model's config and tensors; cases share them."""
    from megadpo.checkpoint.hf import open_hf, read_hf_config

    return read_hf_config(model), open_hf(model)


def _outcome(
    model: Path,
    reference: Path,
    groups: Sequence[Group],
    case: Case,
    num_steps: int,
    dtype: torch.dtype,
    options: ObjectiveConfig,
    scores: bool = False,
) -> Outcome:
    from megadpo.checkpoint.reward_model import as_reward_model
    from megadpo.data.batches.packed_dataset import PackedDataset, PackingOptions
    from megadpo.engine.megatron import MegatronEngine
    from megadpo.model.build import build_stage
    from megadpo.model.families import shape_of
    from megadpo.model.routes import Routes
    from megadpo.model.weights import load_weights
    from megadpo.objectives.coupled import RunningMean
    from megadpo.objectives.objective import Objective
    from megadpo.pipeline.select import pipeline_schedule
    from megadpo.training.global_batch import pack_global_batch
    from megadpo.training.reference import NoReference, Reference, ResidentReference, frozen_stage
    from megadpo.training.score import response_logps
    from megadpo.training.step import optimizer_step, reduce_metrics
    from tests.parity.remembered import RememberedReference

    layout, (hf_config, source) = case.layout, opened(model)
    objective = Objective.of(options)
    if objective.has_reward_head:
        with_head = as_reward_model(hf_config, source, model, seed=3)
        hf_config, source = with_head.config, with_head.source
    packing = PackedDataset.of(
        GroupStore.of(groups),
        PackingOptions(
            share_prompts=case.share_prompts,
            tokens_per_micro_batch=case.tokens_per_micro_batch,
            num_data_parallel=layout.data,
            stream_multiple=layout.stream_multiple * (16 if case.model.fp8 else 1),
            hidden_size=64,
            score_prompts=objective.scores_prompt,
            micro_batches_multiple_of=layout.micro_batches_multiple_of,
        ),
    )
    stage = build_stage(shape_of(hf_config), layout, dtype, case.activations, options=case.model)
    load_weights(stage, source)
    outcome = Outcome()
    if scores:
        outcome.logps = torch.cat([torch.from_numpy(lot) for _, lot in response_logps(stage, packing)])
    run_reference: Reference = NoReference()
    if objective.needs_reference:
        reference_config, reference_source = opened(reference)
        frozen = frozen_stage(shape_of(reference_config), layout, dtype, reference_source, case.model)
        routes = Routes(hf_config.num_local_experts) if case.router_replay else None
        run_reference = ResidentReference(frozen, objective.ld_alpha, case.schedule, routes=routes)
    stage.train()
    train = TrainConfig(
        learning_rate=1e-3,
        clip_norm=1.0,
        router_aux_coef=case.router_aux_coef,
        router_bias_update_rate=case.router_bias_update_rate,
        moments_dtype=case.moments_dtype,
    )
    parallel = ParallelConfig(
        overlap=case.overlap,
        offload=case.offload,
        gradient_accumulation_fusion=case.fusion,
        gradient_dtype=case.gradient_dtype,
    )
    engine = MegatronEngine(stage, train, parallel, pipeline_schedule(case.schedule))
    engine.routes = run_reference.routes
    running_mean, gradients = RunningMean(), {}

    def keep_gradients() -> None:
        gradients.update({name: tensor.clone() for name, tensor in engine.gradients()})

    step_reference = run_reference
    for step in range(max(1, num_steps)):
        batch = pack_global_batch(packing, np.arange(len(groups)), objective)
        keep = keep_gradients if step == 0 else None
        result = optimizer_step(engine, step_reference, batch, objective, running_mean, 1e-3, on_gradients=keep)
        running_mean = result.running_mean
        step_reference = RememberedReference(result.reference_logps)
        outcome.losses.append(reduce_metrics(result.metric_sums, objective)["loss"])
        if step == 0:
            outcome.parts["gradients"] = parts_of(stage, gradients)
            outcome.grad_norm = result.grad_norm
            outcome.router = engine.router_metrics()
            outcome.loss = outcome.losses[0]
            if objective.kind == "pairs":
                margins = [_margins(*both) for both in zip(result.response_sums, result.reference_logps, strict=False)]
                outcome.margins = torch.cat(margins or [torch.empty(0)])
    if num_steps:
        outcome.parts["weights"] = parts_of(stage, {name: tensor for _, name, tensor in engine.state(["weights"])})
        outcome.parts["model_weights"] = parts_of(stage, dict(engine.parameters()))
    states = [state for part in engine.optimizers for state in part.optimizer.state.values()]
    buffers = [buffer for model in engine.models for buffer in model.buffers]
    outcome.num_bytes_of_gradients = sum(buffer.grad_data.nbytes for buffer in buffers)
    outcome.num_bytes_of_moments = sum(state[kind].nbytes for state in states for kind in ("exp_avg", "exp_avg_sq"))
    outcome.num_bytes_moved = 0 if stage.offloader is None else stage.offloader.num_bytes_moved
    outcome.num_recomputed = 0 if stage.recomputer is None else stage.recomputer.num_recomputed
    return outcome


def parts_of(stage: Stage, local: dict[str, Tensor]) -> list[Part]:
    """Copies of rank-local tensors by Megatron name, as parts of whole ones by Hugging Face name."""
    return [
        Part(
            piece.logical_name,
            piece.dim,
            piece.logical_start,
            # As it is now: the engine goes on with its own.
            tensor.narrow(piece.dim, piece.local_start, piece.length).float().cpu().numpy().copy(),
        )
        for name, tensor in local.items()
        for piece in stage.held[name][1].pieces
    ]


def completed(results: list[Outcome]) -> list[Outcome] | None:
    """The outcomes with the parts of all ranks put together and the margins of all ranks, on rank 0; None elsewhere.

    Once for all cases: a collective of small tensors costs a world of four milliseconds.
    """
    of_ranks = gathered([(outcome.parts, outcome.margins.cpu().numpy()) for outcome in results])
    if not of_ranks:
        return None
    for number, outcome in enumerate(results):
        for kind in outcome.parts:
            setattr(outcome, kind, whole_tensors([part for of_rank in of_ranks for part in of_rank[number][0][kind]]))
        outcome.parts = {}
        outcome.margins = torch.cat([torch.from_numpy(of_rank[number][1]) for of_rank in of_ranks])
    return results


def whole_tensors(parts: list[Part]) -> dict[str, Tensor]:
    """Whole tensors by name, float32; nan where no rank has anything."""
    lengths: dict[str, int] = {}
    for part in parts:
        lengths[part.name] = max(lengths.get(part.name, 0), part.start + part.values.shape[part.axis])
    whole: dict[str, Tensor] = {}
    for part in parts:
        if part.name not in whole:
            shape = list(part.values.shape)
            shape[part.axis] = lengths[part.name]
            whole[part.name] = torch.full(shape, torch.nan)
        values = torch.from_numpy(part.values)
        whole[part.name].narrow(part.axis, part.start, values.shape[part.axis]).copy_(values)
    return whole


def _margins(sums_RS: Tensor, reference_R: Tensor | None) -> Tensor:
    ratio_R = sums_RS[:, 0] - (0 if reference_R is None else reference_R)
    return ratio_R[::2] - ratio_R[1::2]


def gathered(value: object) -> list:
    """Every rank's value, on rank 0; [] elsewhere."""
    values: list | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values or []
