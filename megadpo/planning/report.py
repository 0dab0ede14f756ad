"""What was planned, told: a table of the ways that fit, where time and memory go, the YAML to paste, and why others fail."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from megadpo.parallel.layout import Layout
from megadpo.planning.hardware import Rates
from megadpo.planning.memory import RankMemory
from megadpo.planning.search import Found, Job, Misfit, Options, Search
from megadpo.planning.step_time import BUBBLES, IMBALANCE, KERNELS, PRODUCTS, REST, Step

ADVICE = {
    PRODUCTS: "computing bounds it, as it should; fewer tokens (shared prompts, a cached reference) or FP8 help",
    "attention": "attention bounds it: pairs are long; parallel.context or a shorter data.max_length help",
    KERNELS: "the cards' memory bounds it: operations that read and write much and compute little",
    REST: "the host bounds it, which launches small kernels: larger micro-batches or fewer ranks help",
    BUBBLES: "stages wait for each other: more pairs a step, fewer stages, or schedule.reference interleaved help",
    IMBALANCE: "the busiest rank is waited for: more pairs a step even it out",
    "tensor messages": "messages in every layer bound it: a smaller parallel.tensor, or faster links within a node, help",
    "context messages": "keys and queries between context ranks bound it: a smaller parallel.context helps",
    "expert messages": "tokens on their way to their experts bound it: a smaller parallel.expert helps",
    "data-parallel messages": "gradients and parameters between replicas bound it: more pairs a step, or a faster network",
    "host memory": "the bus to the host bounds it: offload less",
}
"""What the largest part of a step's time means, and what helps."""
PARALLEL = (
    *("parallel.engine", "parallel.zero_stage", "parallel.tensor", "parallel.pipeline", "parallel.virtual_pipeline"),
    *("parallel.context", "parallel.expert", "parallel.offload"),
)
DEFAULTS: Options = dict.fromkeys(PARALLEL, 1) | {"parallel.engine": "megatron", "parallel.offload": "none"}


def title(job: Job, rates: Rates, card: str, memory_gib: float, usable_gib: float) -> list[str]:
    """What is planned for, and on what: a few lines."""
    shape = job.shape
    mix = job.workload.mix
    total = total_parameters(job)
    train = job.config.train
    return [
        f"{job.config.model.path}: {counted(total)} parameters, {shape.num_layers} layers, hidden {shape.hidden_size:,}; "
        f"{train.pairs_per_step:,} pairs a step, reference {job.config.reference.mode}, {_trained(job)}",
        f"{job.num_devices:,} x {card}: {rates.peak / 1e12:,.0f} TFLOP/s, of which products reach {rates.products:.0%}; "
        f"{rates.nvlink / 1e9:,.0f} GB/s within a node of {rates.node}, {rates.network / 1e9:,.0f} GB/s beyond; "
        f"{memory_gib:g} GiB, of which {usable_gib:.1f} are planned for",
        f"lengths {job.workload.source}: {mix.pair:,.0f} tokens a pair",
    ]


def total_parameters(job: Job) -> float:
    """Of the whole model."""
    from megadpo.planning.plan import parameters_of

    return sum(parameters_of(job.shape, Layout(), 0))


def _trained(job: Job) -> str:
    return "all weights trained" if job.adapter is None else f"adapters of rank {job.adapter.rank} trained"


def row(found: Found) -> list[str]:
    """A line of the table of what fits."""
    step, plan, layout = found.step, found.step.plan, found.step.plan.layout
    chunks = f" of {layout.virtual}" if layout.virtual > 1 else ""
    sizes = [f"{layout.tensor}", f"{layout.context}", f"{layout.pipeline}{chunks}", f"{layout.data}", f"{layout.expert}"]
    engine = "megatron" if plan.engine == "megatron" else f"ZeRO-{plan.zero_stage}"
    away = "" if plan.offload == "none" else " + offload"
    micro_batches = f"{step.num_micro_batches} x {plan.capacity:,}"
    name, share = step.bounds()[0]
    figures = [f"{step.seconds:.3g}", f"{plan.num_pairs / step.seconds:,.0f}", f"{step.mfu:.2f}", f"{step.gib:.1f}"]
    return [*sizes, engine, plan.recompute + away, micro_batches, *figures, f"{name} {share:.0%}"]


SIZES = ("tensor", "context", "pipeline", "data", "expert")
COLUMNS = (
    *SIZES,
    *("engine", "recompute", "micro-batches"),
    *("s / step", "pairs / s", "MFU", "GiB", "bound by"),
)


def bottleneck(step: Step) -> str:
    """Where a step's time goes, in words."""
    name, share = step.bounds()[0]
    others = [f"{other} {part:.0%}" for other, part in step.bounds()[1:4] if part >= 0.03]
    then = f" (then {', '.join(others)})" if others else ""
    return f"{name} take {share:.0%} of a step{then}: {ADVICE[name]}"


def memory_lines(memory: RankMemory, num_stages: int) -> list[str]:
    """GiB of the fullest rank by kind, largest first."""
    where = f" (stage {memory.stage + 1} of {num_stages})" if num_stages > 1 else ""
    kinds = sorted(memory.by_kind.items(), key=lambda item: -item[1])
    lines = [f"{gib(memory.peak)} GiB on the fullest rank{where}: " + _kinds(kinds)]
    if any(memory.on_host.values()):
        lines.append("in host memory: " + _kinds(memory.on_host.items()))
    return lines


def _kinds(kinds: Iterable[tuple[str, float]]) -> str:
    return ", ".join(f"{kind} {gib(size)}" for kind, size in kinds if size >= 2**30 / 100) or "next to nothing"


def misfit(each: Misfit, usable_gib: float) -> str:
    """Why a layout does not fit, in a sentence."""
    kinds = sorted(each.memory.by_kind.items(), key=lambda item: -item[1])[:3]
    engine = "" if each.plan.engine == "megatron" else f", ZeRO-{each.plan.zero_stage}"
    away = "" if each.plan.offload == "none" else " and offload"
    return (
        f"{each.plan.layout}{engine}, recompute {each.plan.recompute}{away}, {each.plan.capacity:,} tokens: needs "
        f"{gib(each.memory.peak)} GiB of {usable_gib:.1f}: {_kinds(kinds)}"
    )


def yaml_of(job: Job, options: Options) -> str:
    """The options to paste into the configuration: those that differ from the defaults or from what the file says."""
    sections: dict[str, list[str]] = {}
    for dotted, value in options.items():
        section, name = dotted.split(".")
        said = getattr(getattr(job.config, section), name)
        if dotted in DEFAULTS and value == said == DEFAULTS[dotted]:
            continue
        sections.setdefault(section, []).append(f"  {name}: {'null' if value is None else value}")
    return "".join(f"{section}:\n" + "\n".join(lines) + "\n" for section, lines in sections.items())


def as_json(job: Job, found: Search, rates: Rates, memory_gib: float, usable_gib: float) -> dict[str, Any]:
    """All of it for scripts; bytes and seconds."""
    mix = job.workload.mix
    return {
        "model": job.config.model.path,
        "parameters": total_parameters(job),
        "devices": job.num_devices,
        "memory_gib": memory_gib,
        "usable_gib": usable_gib,
        "lengths": {"source": job.workload.source, "tokens_of_a_pair": mix.pair, "scored_share": mix.scored},
        "peak_flops": rates.peak,
        "ways_tried": found.num_tried,
        "fits": [
            {
                "options": each.options,
                "yaml": yaml_of(job, each.options),
                "layout": str(each.step.plan.layout),
                "seconds": each.step.seconds,
                "seconds_by": each.step.seconds_by,
                "pairs_per_second": each.step.plan.num_pairs / each.step.seconds,
                "mfu": each.step.mfu,
                "micro_batches": each.step.num_micro_batches,
                **_memory_json(each.step.memory),
                "bottleneck": bottleneck(each.step),
            }
            for each in found.fits
        ],
        "does_not_fit": [
            {
                "options": each.options,
                "layout": str(each.plan.layout),
                "why": misfit(each, usable_gib),
                **_memory_json(each.memory),
            }
            for each in found.misfits
        ],
        "refused": dict(found.refused),
    }


def _memory_json(memory: RankMemory) -> dict[str, Any]:
    return {
        "bytes": math.ceil(memory.peak),
        "bytes_by": memory.by_kind,
        "bytes_between_steps": math.ceil(sum(memory.between.values())),
        "bytes_on_host": {kind: size for kind, size in memory.on_host.items() if size},
        "stage": memory.stage,
    }


def gib(num_bytes: float) -> str:
    """ "12.3" """
    return f"{num_bytes / 2**30:.1f}" if num_bytes >= 0.1 * 2**30 else f"{num_bytes / 2**30:.2f}"


def counted(number: float) -> str:
    """ "405 B", "1.7 B", "25 M" """
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f}"
