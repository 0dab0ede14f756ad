"""What the ranks of the schedule tests do: the same steps under one schedule after the other, in the same processes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megadpo.config.schema import ObjectiveConfig, ParallelConfig, PipelineScheduleConfig, TrainConfig
from megadpo.data.groups import Group
from megadpo.data.store import GroupStore
from megadpo.parallel.layout import Layout
from tests.parity import zero_worker
from tests.parity.worker import opened

NUM_STEPS, MOVES_AFTER = 3, 1
"""The reference may move halfway to the policy after the second of three steps."""


MEGATRONS, OURS = PipelineScheduleConfig(), PipelineScheduleConfig("1f1b")


@dataclass(frozen=True)
class Case:
    """A layout and engine to try both schedules in.

    Attributes:
        zero_stage: of DeepSpeed; None: Megatron's engine.
        moves: whether the reference moves on the way.
        overlap: whether Megatron's engine reduces gradients while the last micro-batch's backward runs.
        share_prompts: whether the answers of a pair share their prompt.
    """

    layout: Layout
    zero_stage: int | None = None
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    tokens_per_micro_batch: int = 90
    recompute: str = "none"
    router_aux_coef: float = 0.0
    moves: bool = False
    overlap: bool = False
    dtype: torch.dtype = torch.float32
    share_prompts: bool = True
    learning_rate: float = 1e-3

    def __str__(self) -> str:
        engine = "megatron" if self.zero_stage is None else f"ZeRO-{self.zero_stage}"
        rest = f"{self.tokens_per_micro_batch} tokens, share {self.share_prompts}, recompute {self.recompute}, "
        rest += f"aux {self.router_aux_coef}, {self.dtype}"
        return f"{engine}, {self.layout}, {self.objective.loss_types}, {rest}, moves {self.moves}, overlap {self.overlap}"


@dataclass
class Steps:
    """What each step gave on this rank: gradients of its parameters, norm, reference log-probs, policy's log-probs."""

    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    reference_logps: list[list[Tensor]] = field(default_factory=list)
    policy_logps: list[list[Tensor]] = field(default_factory=list)
    totals: list[Tensor] = field(default_factory=list)


@dataclass
class Compared:
    """Ours against Megatron's schedule on one rank.

    Attributes:
        different: what is not the same bits.
        first_margins: of step 0 with the reference interleaved.
        num_micro_batches: of each step.
    """

    case: str
    different: list[str]
    first_margins: Tensor
    num_micro_batches: list[int]


def compared(model: Path, reference: Path, groups: Sequence[Group], cases: Sequence[Case]) -> list[Compared]:
    """Every case under Megatron's schedule, under ours, and under ours with the reference interleaved."""
    from megadpo.parallel.world import joined_world

    dist.init_process_group("gloo")
    results = []
    for case in cases:
        with joined_world(case.layout, seed=1):
            theirs = _steps(model, reference, groups, case, MEGATRONS)
            ours = _steps(model, reference, groups, case, OURS)
            interleaved = _steps(model, reference, groups, case, replace(OURS, reference="interleaved"))
            different = _differences(ours, theirs, "ours") + _differences(interleaved, theirs, "interleaved")
            first = zip(interleaved.policy_logps[0], interleaved.reference_logps[0], strict=True)
            margins = torch.cat([a - b for a, b in first] or [torch.empty(0)])
            counts = [len(logps) for logps in theirs.policy_logps]
            results.append(Compared(str(case), different, margins, counts))
    dist.destroy_process_group()
    return results


def delayed(model: Path, reference: Path, groups: Sequence[Group], cases: Sequence[Case]) -> list[Compared]:
    """Every case under our 1F1B with weight gradients added by one product, and with these delayed, the reference before and
    interleaved; and, within 1e-6, the first step's gradients under Megatron's schedule, which autograd adds up."""
    from megadpo.parallel.world import joined_world

    dist.init_process_group("gloo")
    results = []
    for case in cases:
        with joined_world(case.layout, seed=1):
            at_once = _steps(model, reference, groups, case, OURS, fusion=True)
            theirs = _steps(model, reference, groups, case, MEGATRONS).gradients[0]
            far = {name: _distance(at_once.gradients[0][name], gradient) for name, gradient in theirs.items()}
            different, first = [f"{name}: {distance}" for name, distance in far.items() if distance > 1e-6], torch.empty(0)
            for arm in ("before", "interleaved"):
                later = _steps(model, reference, groups, case, replace(OURS, reference=arm, zero_bubble=True))
                different += _differences(later, at_once, arm)
                pairs = zip(later.policy_logps[0], later.reference_logps[0], strict=True)
                first = torch.cat([first, *(a - b for a, b in pairs)])
            counts = [len(logps) for logps in at_once.policy_logps]
            results.append(Compared(str(case), different, first, counts))
    dist.destroy_process_group()
    return results


@dataclass
class Apart:
    """Pairs whose answers travel apart against pairs that travel whole, on one rank.

    Attributes:
        worst: ||a - b|| / ||b|| of the worst gradient, norm, metric and log-prob of any step, by name.
        from_one_stage: of the worst gradient of step 0 against that of a model without pipeline stages; 0 with tensor ranks.
        first_margins: of step 0, with the reference before and interleaved.
    """

    worst: dict[str, float]
    from_one_stage: float
    first_margins: Tensor


def apart(model: Path, reference: Path, groups: Sequence[Group], cases: Sequence[Case]) -> list[Apart]:
    """Every case whole under Megatron's schedule, and in halves with the reference interleaved where there are stages, else
    before; a case in which the reference moves has both."""
    from megadpo.parallel.world import joined_world

    dist.init_process_group("gloo")
    twins, results = {}, []
    # Gradients are compared, which are of the same weights only as long as these hardly move: AdamW's first updates are of
    # one size, however small the gradient, and turn rounding into other weights.
    for case in (replace(case, learning_rate=1e-5) for case in cases):
        twin = Case(Layout(data=dist.get_world_size()), objective=case.objective, router_aux_coef=case.router_aux_coef)
        if str(twin) not in twins:
            with joined_world(twin.layout, seed=1):
                twins[str(twin)] = _steps(model, reference, groups, twin, MEGATRONS)
        with joined_world(case.layout, seed=1):
            whole = _steps(model, reference, groups, case, MEGATRONS)
            arms = ("before", "interleaved") if case.moves else ("interleaved" if case.layout.pipeline > 1 else "before",)
            apart_by = [PipelineScheduleConfig("1f1b", arm, split_pairs=True) for arm in arms]
            halves = [_steps(model, reference, groups, case, schedule) for schedule in apart_by]
        first = [zip(steps.policy_logps[0], steps.reference_logps[0], strict=True) for steps in halves]
        margins = [a - b for pairs in first for a, b in pairs]
        worst = {name: max(_distances(steps, whole)[name] for steps in halves) for name in _distances(whole, whole)}
        others = twins[str(twin)].gradients[0]
        own = {} if case.layout.tensor > 1 else halves[0].gradients[0]  # shards are of other shapes
        # A head that is tied to the embedding of another stage has a name of its own.
        tied = others["embedding.word_embeddings.weight"]
        from_one = max((_distance(gradient, others.get(name, tied)) for name, gradient in own.items()), default=0.0)
        results.append(Apart(worst, from_one, torch.cat(margins or [torch.empty(0)])))
    dist.destroy_process_group()
    return results


def _distances(ours: Steps, theirs: Steps) -> dict[str, float]:
    found = {"gradient": 0.0, "norm": 0.0, "metrics": 0.0, "log-probs": 0.0}
    for step in range(NUM_STEPS):
        pairs = [(ours.gradients[step][name], gradient) for name, gradient in theirs.gradients[step].items()]
        found["gradient"] = max([found["gradient"], *(_distance(a, b) for a, b in pairs)])
        found["norm"] = max(found["norm"], abs(ours.norms[step] / theirs.norms[step] - 1))
        found["metrics"] = max(found["metrics"], _distance(ours.totals[step], theirs.totals[step]))
        for which in ("reference_logps", "policy_logps"):
            pairs = list(zip(getattr(ours, which)[step], getattr(theirs, which)[step], strict=True))
            found["log-probs"] = max([found["log-probs"], *(_distance(a, b) for a, b in pairs)])
    return found


def _distance(ours: Tensor, theirs: Tensor) -> float:
    if not theirs.numel() or not theirs.any():
        return float(ours.norm())
    return float((ours - theirs).norm() / theirs.norm())


def _differences(ours: Steps, theirs: Steps, name: str) -> list[str]:
    found = []
    for step in range(NUM_STEPS):
        for parameter, gradient in theirs.gradients[step].items():
            if not torch.equal(ours.gradients[step][parameter], gradient):
                found.append(f"{name}, step {step}: gradient of {parameter}")
        if ours.norms[step] != theirs.norms[step]:
            found.append(f"{name}, step {step}: norm")
        if not torch.equal(ours.totals[step], theirs.totals[step]):
            found.append(f"{name}, step {step}: metrics")
        for which in ("reference_logps", "policy_logps"):
            pairs = zip(getattr(ours, which)[step], getattr(theirs, which)[step], strict=True)
            if not all(torch.equal(a, b) for a, b in pairs):
                found.append(f"{name}, step {step}: {which}")
    return found


def _steps(
    model: Path,
    reference: Path,
    groups: Sequence[Group],
    case: Case,
    schedule: PipelineScheduleConfig,
    fusion: bool | None = None,
) -> Steps:
    from megadpo.data.batches.packed_dataset import PackedDataset, PackingOptions
    from megadpo.engine.megatron import MegatronEngine
    from megadpo.model.activations import Activations
    from megadpo.model.build import build_stage
    from megadpo.model.families import shape_of
    from megadpo.model.weights import load_weights
    from megadpo.objectives.coupled import RunningMean
    from megadpo.objectives.objective import Objective
    from megadpo.pipeline.select import pipeline_schedule
    from megadpo.training.global_batch import pack_global_batch
    from megadpo.training.reference import References, ResidentInterleavedReference, ResidentReference
    from megadpo.training.step import optimizer_step

    layout, (hf_config, source) = case.layout, opened(model)
    packing = PackedDataset.of(
        GroupStore.of(groups),
        PackingOptions(
            share_prompts=case.share_prompts,
            tokens_per_micro_batch=case.tokens_per_micro_batch,
            num_data_parallel=layout.data,
            stream_multiple=layout.stream_multiple,
            hidden_size=64,
            micro_batches_multiple_of=layout.micro_batches_multiple_of,
            split_pairs=schedule.split_pairs,
        ),
    )
    built = zero_worker.Case(
        layout, case.zero_stage, case.tokens_per_micro_batch, case.recompute, dtype=case.dtype, objective="sigmoid"
    )
    frozen = zero_worker.frozen(built, *opened(reference))
    objective = Objective.of(case.objective)
    kind = ResidentInterleavedReference if schedule.reference == "interleaved" else ResidentReference
    references = References(kind(frozen, objective.ld_alpha, schedule), None)
    own_schedule = pipeline_schedule(schedule, references.train.interleaved)
    engine: Any
    if case.zero_stage is None:
        stage = build_stage(shape_of(hf_config), layout, case.dtype, Activations(case.recompute))
        load_weights(stage, source)
        train = TrainConfig(learning_rate=1e-3, router_aux_coef=case.router_aux_coef)
        parallel = ParallelConfig(overlap=case.overlap, gradient_accumulation_fusion=fusion)
        engine = MegatronEngine(stage, train, parallel, own_schedule)
    else:
        engine = zero_worker.make_engine(built, hf_config, source, own_schedule)
    engine.stage.train()
    steps, running_mean = Steps(), RunningMean()
    batches = [pack_global_batch(packing, lot, objective) for lot in np.array_split(np.arange(len(groups)), NUM_STEPS)]

    def keep_gradients() -> None:
        steps.gradients.append({name: tensor.clone() for name, tensor in engine.gradients()})

    for step, batch in enumerate(batches):
        moves = case.moves and step == MOVES_AFTER
        following = None if moves or step + 1 == NUM_STEPS else functools.partial(batches.__getitem__, step + 1)
        result = optimizer_step(
            engine, references.train, batch, objective, running_mean, case.learning_rate, following, keep_gradients
        )
        running_mean = result.running_mean
        steps.totals.append(result.metric_sums)
        steps.policy_logps.append([sums_RS[:, 0] for sums_RS in result.response_sums])
        steps.reference_logps.append(result.reference_logps[: len(result.response_sums)])
        steps.norms.append(result.grad_norm)
        if moves:
            references.move(engine.stage, 0.5)
    return steps
