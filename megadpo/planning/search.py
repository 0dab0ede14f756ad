"""Every way to run a configuration on so many devices that the package's own checks let pass; those that fit, fastest first.

Searched are the layout (tensor x pipeline x context x expert x data, chunks of stages), the micro-batch, what is recomputed,
the engine with its ZeRO stage, and offload. Of two ways that differ only in what is recomputed or moved away the one that
costs less time is taken if it fits. What the command line names is held to.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megadpo.config.schema import Config, TrainConfig
from megadpo.errors import UserError
from megadpo.model.adapters.spec import AdapterSpec, adapter_shapes
from megadpo.model.by_name import first_match
from megadpo.model.families import logical_shapes
from megadpo.model.four_bit.weight import FourBit
from megadpo.model.shape import ModelShape
from megadpo.parallel.layout import Layout, choose_layout
from megadpo.planning.hardware import Rates
from megadpo.planning.memory import RankMemory
from megadpo.planning.plan import Plan
from megadpo.planning.step_time import Step, fullest_rank, predict
from megadpo.planning.workload import Workload
from megadpo.validation.combinations import check_combinations
from megadpo.validation.layout import check_layout
from megadpo.validation.memory import check_memory_options, check_recompute_layers
from megadpo.validation.model import check_adapters, check_experts, check_linear_attention, check_same_routes
from megadpo.validation.values import validate

CAPACITIES = (2048, 4096, 8192, 16_384)
"""Tokens of a micro-batch that are tried beside the configuration's own."""
MOST_STAGES = 64
Options = dict[str, Any]
"""Values by dotted name: what a candidate sets."""
RUNGS: tuple[Options, ...] = (
    {"train.recompute": "none"},
    {"train.recompute": "small"},
    {"train.recompute": "full"},
    {"train.recompute": "small", "parallel.offload": "cpu"},
    {"train.recompute": "full", "parallel.offload": "cpu"},
)
"""From what costs no time to what costs most, and saves most memory."""
ENGINES: tuple[Options, ...] = (
    {"parallel.engine": "megatron", "parallel.zero_stage": 1},
    {"parallel.engine": "deepspeed", "parallel.zero_stage": 2},
    {"parallel.engine": "deepspeed", "parallel.zero_stage": 3},
)
SIZES = ("parallel.tensor", "parallel.pipeline", "parallel.context", "parallel.expert", "parallel.virtual_pipeline")
SEARCHED = (*SIZES, *ENGINES[0], "parallel.offload", "train.recompute", "train.tokens_per_micro_batch")


@dataclass(frozen=True)
class Found:
    """A way that fits.

    Attributes:
        options: what it sets, of SEARCHED.
    """

    options: Options
    step: Step


@dataclass(frozen=True)
class Misfit:
    """A layout that does not fit, whatever is recomputed or moved away, in the way of it that needs least."""

    options: Options
    plan: Plan
    memory: RankMemory


@dataclass
class Search:
    """What was found.

    Attributes:
        fits: the fastest first.
        misfits: what needs least first.
        refused: why layouts were refused, with how many.
        num_tried: ways whose memory was reckoned.
    """

    fits: list[Found] = field(default_factory=list)
    misfits: list[Misfit] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    num_tried: int = 0


@dataclass(frozen=True)
class Job:
    """What is planned for.

    Attributes:
        config: checked; what it says about SEARCHED is replaced but for the names in `held`.
        adapter: what is trained in place of the model.
        on_cpu: whether the devices are CPUs.
    """

    config: Config
    shape: ModelShape
    workload: Workload
    num_devices: int
    held: Collection[str] = ()
    reference: ModelShape | None = None
    adapter: AdapterSpec | None = None
    on_cpu: bool = False


def _num_moments(train: TrainConfig, shape: ModelShape) -> float:
    """fp32 moments that the optimizer keeps of a weight, on average over the model."""
    if train.optimizer == "sgd":
        return 0.0 if train.momentum == 0 else 1.0
    if train.optimizer == "muon":  # of what is no matrix of a layer AdamW keeps two
        sizes = {name: math.prod(size) for name, size in logical_shapes(shape).items()}
        outside = sum(size for name, size in sizes.items() if not name.startswith("model.layers."))
        return 1.0 + outside / sum(sizes.values())
    return {"adamw": 2.0, "adamw_8bit": 2 * (1 + 4 / 256) / 4, "lion": 1.0}[train.optimizer]


def _trained_share(train: TrainConfig, shape: ModelShape, adapter: AdapterSpec | None) -> float:
    if not train.freeze:
        return 1.0
    shapes = logical_shapes(shape) if adapter is None else adapter_shapes(shape, adapter)
    sizes = {name: math.prod(size) for name, size in shapes.items()}
    return sum(size for name, size in sizes.items() if first_match(train.freeze, name) is None) / sum(sizes.values())


def plan_of(
    config: Config, shape: ModelShape, num_devices: int, adapter: AdapterSpec | None = None, on_cpu: bool = False
) -> Plan:
    """The plan that a configuration describes, its `auto`s settled as on such a device.

    Raises:
        UserError: its sizes do not fit the number of devices.
    """
    parallel, train, schedule, mode = config.parallel, config.train, config.schedule, config.reference.mode
    reference = schedule.reference if mode == "resident" else mode
    if mode == "cached" and adapter is not None and config.reference.path in (None, config.model.path):
        reference = "cached_adapter"
    is_bf16 = config.model.dtype == "bf16" or (config.model.dtype == "auto" and not on_cpu)
    return Plan(
        shape,
        choose_layout(parallel, num_devices),
        train.pairs_per_step,
        recompute=("none" if on_cpu else "small") if train.recompute == "auto" else train.recompute,
        capacity=train.tokens_per_micro_batch,
        reference=reference,
        engine=parallel.engine,
        zero_stage=parallel.zero_stage,
        offload=parallel.offload,
        number_bytes=2 if is_bf16 else 4,
        gradient_bytes=2 if parallel.gradient_dtype == "bf16" else 4,
        moment_bytes=2 if train.moments_dtype == "bf16" else 4,
        num_moments=_num_moments(train, shape),
        trained_share=_trained_share(train, shape, adapter),
        activation_offload=train.activation_offload,
        window_bytes=train.activation_offload_window_mib << 20,
        block_layers=train.recompute_num_layers if train.recompute_method == "block" else None,
        unit_layers=(train.recompute_num_layers or 1) if train.recompute_method != "block" else 1,
        adapter=adapter,
        four_bit=FourBit.of(config.model),
        on_cpu=on_cpu,
        overlap=parallel.overlap if parallel.overlap is not None else not on_cpu,
        fusion=parallel.gradient_accumulation_fusion
        if parallel.gradient_accumulation_fusion is not None
        else not on_cpu or schedule.zero_bubble,
        zero_bubble=schedule.zero_bubble,
        split_pairs=schedule.split_pairs,
    )


def search(job: Job, rates: Rates, usable_bytes: float, top: int = 5) -> Search:
    """The `top` fastest ways that fit into `usable_bytes` of a device, and as many that do not.

    Raises:
        UserError: there are no devices, or pairs are longer than any micro-batch that may be.
    """
    if job.num_devices < 1:
        raise UserError(f"--devices must be at least 1, got {job.num_devices}")
    result = Search()
    bounds: list[Found] = []
    for config, options in _candidates(job, rates.node, result):
        last: tuple[Options, Plan, RankMemory] | None = None
        for rung in _rungs(job):
            candidate, more = _with(config, rung), options | rung
            try:
                plan = _checked(job, candidate)
            except UserError:
                continue
            result.num_tried += 1
            packed = job.workload.packed(
                plan.num_pairs, plan.layout.data, plan.capacity, plan.layout.micro_batches_multiple_of
            )
            memory = fullest_rank(plan, job.workload, packed)
            if memory.peak <= usable_bytes:
                bounds.append(Found(more, predict(plan, job.workload, rates, with_bubbles=False)))
                last = None
                break
            if last is None or memory.peak < last[2].peak:
                last = more, plan, memory
        if last is not None:
            result.misfits.append(Misfit(*last))
    result.fits = _fastest(bounds, job.workload, rates, top)
    result.misfits = _nearest(result.misfits, top)
    return result


def _fastest(bounds: list[Found], workload: Workload, rates: Rates, top: int) -> list[Found]:
    """Simulated in the order of what they take at least, until none that is left can be among the fastest."""
    best: list[Found] = []
    for bound in sorted(bounds, key=lambda each: each.step.seconds):
        if len(best) == top and bound.step.seconds >= best[-1].step.seconds:
            break
        best.append(Found(bound.options, predict(bound.step.plan, workload, rates)))
        best = sorted(best, key=lambda each: each.step.seconds)[:top]
    return best


def _nearest(misfits: list[Misfit], top: int) -> list[Misfit]:
    """Of the layouts that need least, each in the way of it that does."""
    nearest: dict[Layout, Misfit] = {}
    for each in sorted(misfits, key=lambda each: each.memory.peak):
        nearest.setdefault(each.plan.layout, each)
    return list(nearest.values())[:top]


def _candidates(job: Job, node: int, result: Search) -> Iterator[tuple[Config, Options]]:
    """Layouts, engines and micro-batches; what is refused is counted."""
    longest = int(job.workload.tokens_G.max())
    own = job.config.train.tokens_per_micro_batch
    capacities = sorted({own, *CAPACITIES}) if "train.tokens_per_micro_batch" not in job.held else [own]
    capacities = [capacity for capacity in capacities if capacity >= longest]
    if not capacities:
        raise UserError(
            f"the longest pair has {longest} tokens, more than train.tokens_per_micro_batch {own}; raise that to at least "
            f"{longest}, or lower data.max_length"
        )
    unsaved = {name: "none" for name in ("train.recompute", "parallel.offload") if name not in job.held}
    configured = (job.config.parallel.pipeline, job.config.parallel.virtual_pipeline)
    for sizes, engine in itertools.product(_sizes(job, node), _engines(job)):
        chosen = sizes | engine
        is_own = configured == (sizes["parallel.pipeline"], sizes["parallel.virtual_pipeline"])
        if job.config.parallel.pipeline_layout is not None and not is_own:
            chosen["parallel.pipeline_layout"] = None  # made for the sizes that the configuration names
        candidate = _with(job.config, chosen | unsaved)
        try:
            validate(candidate)
            _checked(job, candidate)
        except UserError as error:
            result.refused[str(error)] += 1
            continue
        for capacity in capacities:
            more = {"train.tokens_per_micro_batch": capacity}
            yield _with(candidate, more), chosen | more


def _sizes(job: Job, node: int) -> Iterator[Options]:
    """Tensor and context ranks within a node, but for contexts that no node can hold; the rest is for replicas."""
    count, shape, config = job.num_devices, job.shape, job.config
    numbers = [n for n in range(1, count + 1) if count % n == 0]

    def of(name: str, values: Sequence[int]) -> Sequence[int]:
        return [_value(config, name)] if name in job.held else values

    experts = [1] if shape.experts is None else [n for n in numbers if shape.experts.count % n == 0]
    for tensor, context, pipeline in itertools.product(
        of("parallel.tensor", [n for n in numbers if n <= node]),
        of("parallel.context", [n for n in numbers if n <= node]),
        of("parallel.pipeline", [n for n in numbers if n <= min(MOST_STAGES, shape.num_layers)]),
    ):
        if count % (tensor * context * pipeline):
            continue
        if tensor * context > node and not {"parallel.tensor", "parallel.context"} & set(job.held):
            continue
        virtual = [1] + [n for n in (2, 3, 4, 5, 6, 7) if pipeline > 1 and shape.num_layers % (pipeline * n) == 0]
        configured = config.parallel.virtual_pipeline
        if configured > 1 and pipeline == config.parallel.pipeline and configured not in virtual:
            virtual.append(configured)
        for chunks, expert in itertools.product(of(SIZES[4], virtual), of(SIZES[3], experts)):
            yield dict(zip(SIZES, (tensor, pipeline, context, expert, chunks), strict=True))


def _rungs(job: Job) -> list[Options]:
    """RUNGS, without what is held to."""
    free = [{name: value for name, value in rung.items() if name not in job.held} for rung in RUNGS]
    return [rung for number, rung in enumerate(free) if rung not in free[:number]]


def _engines(job: Job) -> list[Options]:
    """ENGINES that have what is held to, or just that."""
    own = {name: _value(job.config, name) for name in ENGINES[0]}
    held = {name: value for name, value in own.items() if name in job.held}
    return [engine for engine in ENGINES if engine | held == engine] or [own]


def _checked(job: Job, config: Config) -> Plan:
    """The plan of a candidate.

    Raises:
        UserError: as a run would raise it.
    """
    check_memory_options(config)
    check_combinations(config)
    plan = plan_of(config, job.shape, job.num_devices, job.adapter, job.on_cpu)
    check_layout(plan.layout, job.shape, config.train.pairs_per_step)
    check_recompute_layers(config.train, plan.layout, job.shape.num_layers)
    check_experts(config, job.shape)
    check_linear_attention(config, job.shape, job.reference)
    if job.adapter is not None:
        check_adapters(config, job.shape, plan.layout, job.adapter)
    if job.reference is not None:
        check_same_routes(config, job.reference, job.shape)
        check_layout(plan.layout, job.reference)
    return plan


def _value(config: Config, dotted: str) -> Any:
    section, name = dotted.split(".")
    return getattr(getattr(config, section), name)


def _with(config: Config, options: Options) -> Config:
    """A copy with these options; sections that none of them is in are shared."""
    changed: dict[str, Any] = {}
    for dotted, value in options.items():
        section, name = dotted.split(".")
        changed.setdefault(section, dataclasses.replace(getattr(config, section)))
        setattr(changed[section], name, value)
    return dataclasses.replace(config, **changed)
