"""Predicts seconds, MFU, memory and bounds of a step on many H100s, from what one card said; nothing is trained.

A stage's forward and backward of a micro-batch are its products, attention and bytes moved at the rates that a card reached,
and messages at rates that are assumed. A pipeline's bubbles are simulated (megadpo/pipeline/simulate.py), the balance of
replicas is that of the package's own packing of pairs with UltraFeedback-like lengths, and a layout is looked at if the
package's checks let it pass and it fits into memory. Of these the fastest is printed. What a rate stands for and how much
of this is assumed: docs/many_gpus.md. With a live reference, bf16, fp32 moments, ZeRO-1 and `parallel.overlap`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

from benchmarks.common import print_table
from benchmarks.material import synthetic_groups
from megadpo.config.schema import copy_config
from megadpo.data.store import GroupStore
from megadpo.errors import UserError
from megadpo.model.families import shape_of
from megadpo.model.shape import ModelShape, head_work
from megadpo.parallel.layout import Layout, choose_layout
from megadpo.planning.hardware import Rates
from megadpo.planning.plan import Plan
from megadpo.planning.step_time import Step, predict
from megadpo.planning.workload import Workload
from megadpo.validation.layout import check_layout
from megadpo.validation.load import load_config
from megadpo.validation.values import validate

QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "vocab_size": 151_936}
QWEN3_MOE = QWEN3 | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128_256}


def _body(hidden: int, layers: int, heads: int, key_value_heads: int, ffn: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": ffn}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": key_value_heads}
    return sizes | heads_of | {"tie_word_embeddings": False}


MODELS: dict[str, dict[str, Any]] = {
    "1.7B": QWEN3 | _body(2048, 28, 16, 8, 6144) | {"tie_word_embeddings": True},
    "8B": QWEN3 | _body(4096, 36, 32, 8, 12_288),
    "70B": LLAMA | _body(8192, 80, 64, 8, 28_672),
    "235B-A22B": QWEN3_MOE
    | _body(4096, 94, 64, 4, 12_288)
    | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536},
}
"""What the prediction needs of their configs: Qwen3, Llama 3 (70B) and Qwen3-MoE."""

CAPACITIES = (4096, 8192, 16_384)
RECOMPUTE = ("none", "small", "full")
VIRTUAL = (1, 2, 4, 5)
"""What is tried beside the layouts, and chunks of a stage."""
MEASURED = (
    # options, seconds a step, peak GiB on one H100 (benchmarks/results.md); reference and train.recompute
    ("before", "none", 1.237, 67.0),
    ("before", "small", 1.252, 51.6),
    ("before", "full", 1.495, 35.5),
    ("precomputed", "small", 1.017, 48.4),
)


MIX, VOCABULARY, NUM_GROUPS = "UltraFeedback-like", 151_936, 192
"""Lengths of pairs: of those on which the card was measured."""


@functools.cache
def workload_of(shape: ModelShape) -> Workload:
    """What a step of the model has to compute."""
    groups = synthetic_groups(MIX, NUM_GROUPS, VOCABULARY, longest=2048)
    return Workload.of(GroupStore.of(groups), shape.hidden_size, head_work(shape), MIX)


def plans(shape: ModelShape, num_gpus: int, num_pairs: int, rates: Rates, reference: str) -> Iterator[Plan]:
    """Every layout that the package's checks let pass, with what else is tried."""
    for layout in _layouts(shape, num_gpus, num_pairs, rates, reference):
        for recompute in RECOMPUTE:
            for capacity in CAPACITIES:
                yield Plan(shape, layout, num_pairs, recompute, capacity, reference)


def _layouts(shape: ModelShape, num_gpus: int, num_pairs: int, rates: Rates, reference: str) -> Iterator[Layout]:
    """Tensor and context ranks are looked for within a node, stages up to 32."""
    config = load_config({}, [f"train.pairs_per_step={num_pairs}"])
    powers = [2**power for power in range(num_gpus.bit_length())]
    experts = [1] if shape.experts is None else [size for size in powers if size <= shape.experts.count]
    for tensor, context, pipeline in itertools.product(powers, powers, powers):
        if tensor * context > rates.node or pipeline > 32 or num_gpus % (tensor * context * pipeline):
            continue
        for virtual, expert in itertools.product(VIRTUAL, experts):
            if virtual > 1 and (pipeline == 1 or shape.num_layers % (pipeline * virtual)):
                continue
            candidate = copy_config(config)
            parallel, schedule = candidate.parallel, candidate.schedule
            parallel.tensor, parallel.context, parallel.expert = tensor, context, expert
            parallel.pipeline, parallel.virtual_pipeline = pipeline, virtual
            if reference == "interleaved" and pipeline > 1:
                schedule.name, schedule.reference = "1f1b", "interleaved"
            try:
                validate(candidate)
                layout = choose_layout(parallel, num_gpus)
                check_layout(layout, shape, num_pairs)
            except UserError:
                continue
            yield layout


def best_step(shape: ModelShape, num_gpus: int, num_pairs: int, rates: Rates, reference: str = "before") -> Step | None:
    """The fastest of `plans` that fits into memory; None: none does."""
    pairs = workload_of(shape)
    tried = plans(shape, num_gpus, num_pairs, rates, reference)
    bounds = [predict(plan, pairs, rates, with_bubbles=False) for plan in tried]
    best: Step | None = None
    for bound in sorted((each for each in bounds if each.gib <= rates.gib), key=lambda each: each.seconds):
        if best is not None and bound.seconds >= best.seconds:
            break
        step = predict(bound.plan, pairs, rates)
        if best is None or step.seconds < best.seconds:
            best = step
    return best


def one_card(rates: Rates) -> list[tuple[Step, float, float]]:
    """Predicted steps of what was measured on one card, each with the seconds and GiB of that."""
    shape = shape_of(MODELS["1.7B"])
    return [
        (predict(Plan(shape, Layout(), 64, recompute, reference=reference), workload_of(shape), rates), seconds, gib)
        for reference, recompute, seconds, gib in MEASURED
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models = [name for name in MODELS if name != "1.7B"]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=models, help="(default: %(default)s)")
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 32, 128, 512, 1024], help="(default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=1024, help="a step, for the first table (default: %(default)s)")
    parser.add_argument("--pairs-per-gpu", type=int, default=32, help="for the second table (default: %(default)s)")
    parser.add_argument(
        "--reference", choices=("before", "interleaved", "precomputed"), default="before", help="(default: %(default)s)"
    )
    for each in dataclasses.fields(Rates):
        kind = type(each.default)
        parser.add_argument(
            "--" + each.name.replace("_", "-"),
            type=kind,
            default=each.default,
            help=f"{each.metadata['help']}; {each.metadata['source']} (default: {each.default:g})",
        )


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    if min(*options.gpus, options.pairs, options.pairs_per_gpu) < 1:
        raise SystemExit("benchmarks predict needs at least one GPU and one pair")
    rates = Rates(**{each.name: getattr(options, each.name) for each in dataclasses.fields(Rates)})
    report["rates"] = dataclasses.asdict(rates)
    rows = [
        [
            f"`--{each.name.replace('_', '-')}`",
            f"{getattr(rates, each.name):g}",
            each.metadata["source"],
            each.metadata["help"],
        ]
        for each in dataclasses.fields(Rates)
    ]
    print_table("Rates", ["option", "value", "", "what it is"], rows)
    cards = one_card(rates)
    report["one_card"] = [{"predicted": _figures(step), "measured": [seconds, gib]} for step, seconds, gib in cards]
    print_table(
        "One H100, the 1.7B model, 64 pairs a step: predicted and measured",
        ["reference", "recompute", "s / step", "measured", "GiB", "measured", "MFU"],
        [
            [
                step.plan.reference,
                step.plan.recompute,
                f"{step.seconds:.2f}",
                f"{seconds:.2f}",
                f"{step.gib:.0f}",
                f"{gib:.0f}",
                f"{step.mfu:.2f}",
            ]
            for step, seconds, gib in cards
        ],
    )
    report["steps"] = []
    fixed, growing = f"{options.pairs:,} pairs a step", f"{options.pairs_per_gpu} pairs a GPU and step"
    for title, pairs_of in ((fixed, lambda gpus: options.pairs), (growing, lambda gpus: options.pairs_per_gpu * gpus)):
        lines = []
        for name in options.models:
            for gpus in options.gpus:
                step = best_step(shape_of(MODELS[name]), gpus, pairs_of(gpus), rates, options.reference)
                lines.append([name, gpus, *_cells(step)])
                if step is not None:
                    report["steps"].append({"model": name, "gpus": gpus, **_figures(step)})
        columns = ["model", "GPUs", "tensor", "context", "pipeline", "data", "expert", "recompute", "micro-batches"]
        print_table(title, [*columns, "s / step", "pairs / s", "MFU", "GiB", "bound by", "then"], lines)


def _figures(step: Step) -> dict[str, Any]:
    plan = step.plan
    chosen = {"layout": str(plan.layout), "recompute": plan.recompute, "capacity": plan.capacity, "pairs": plan.num_pairs}
    return chosen | {"seconds": step.seconds, "seconds_by": step.seconds_by, "gib": step.gib, "mfu": step.mfu}


def _cells(step: Step | None) -> list[str]:
    """Of a line of the tables, from the layout on."""
    if step is None:
        return ["does not fit", *[""] * 12]
    plan, layout = step.plan, step.plan.layout
    chunks = f" of {layout.virtual} chunks" if layout.virtual > 1 else ""
    sizes = [f"{layout.tensor}", f"{layout.context}", f"{layout.pipeline}{chunks}", f"{layout.data}", f"{layout.expert}"]
    micro_batches = f"{step.num_micro_batches} of {plan.capacity:,}"
    bounds = [f"{name} {share:.0%}" for name, share in step.bounds()[:2]]
    figures = [f"{step.seconds:.2f}", f"{plan.num_pairs / step.seconds:,.0f}", f"{step.mfu:.2f}", f"{step.gib:.0f}"]
    return [*sizes, plan.recompute, micro_batches, *figures, *bounds]
