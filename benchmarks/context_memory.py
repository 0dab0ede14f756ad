"""Activation memory of a rank under context parallelism, by both methods.

One forward and backward of a packed stream of prompts with two responses each, on 1 process and on several context ranks by
both methods. Two figures a rank, the larger one of the ranks: what autograd keeps for the backward pass when the
forward pass is over (each storage once, parameters left out), and the peak resident set above what the process held before
the step. Beside them the seconds of the step, and how evenly attention's query-key pairs are spread.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from benchmarks.common import add_shared, print_table
from benchmarks.ranks import on_ranks

MIB = 2**20


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    report["points"] = [
        _point({**vars(options), "key_value_heads": heads, "context": context, "method": method})
        for heads in options.key_value_heads
        for context, method in [(1, "auto"), (options.context, "ulysses"), (options.context, "allgather")]
    ]
    _print(report, options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, hidden=128, layers=4, heads=8)
    parser.add_argument("--tokens", type=int, default=32768, help="of the stream")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--response", type=int, default=512, help="tokens of each of a prompt's two responses")
    parser.add_argument("--context", type=int, default=2, help="context ranks")
    parser.add_argument("--key-value-heads", type=int, nargs="+", default=[8, 2])
    parser.set_defaults(threads=1)


def _point(point: dict[str, Any]) -> dict[str, Any]:
    """The same step on `context` fresh processes."""
    ranks = on_ranks(point["context"], _rank, point)
    return {
        "method": point["method"] if point["context"] > 1 else "one rank",
        "key_value_heads": point["key_value_heads"],
        "kept_mib": max(rank["kept_mib"] for rank in ranks),
        "peak_mib": max(rank["peak_mib"] for rank in ranks),
        "seconds": max(rank["seconds"] for rank in ranks),
        "pairs_over_mean": max(rank["pairs"] for rank in ranks) * len(ranks) / sum(rank["pairs"] for rank in ranks),
    }


def _rank(point: dict[str, Any]) -> dict[str, float]:
    import torch

    from megadpo.parallel.layout import Layout
    from megadpo.parallel.world import joined_world

    torch.set_num_threads(point["threads"])
    with joined_world(Layout(context=point["context"], context_method=point["method"]), seed=0):
        return _measure(point)


def _measure(point: dict[str, Any]) -> dict[str, float]:
    import torch
    from transformers import LlamaConfig

    from benchmarks.head_point import peak_bytes
    from megadpo.model.build import build_stage
    from megadpo.model.families import shape_of
    from megadpo.parallel.context import with_own_shard
    from megadpo.parallel.layout import Layout
    from megadpo.pipeline.megatron_schedule import MegatronSchedule
    from megadpo.platform.allocator import give_back_freed_blocks

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=point["hidden"],
        intermediate_size=point["hidden"] * 11 // 4,
        num_hidden_layers=point["layers"],
        num_attention_heads=point["heads"],
        num_key_value_heads=point["key_value_heads"],
        max_position_embeddings=point["tokens"],
    )
    stage = build_stage(shape_of(config), Layout(context=point["context"], context_method=point["method"]), torch.float32)
    with torch.no_grad():
        for parameter in stage.model.parameters():
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in stage.model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def ones(number: int, sums_RS: torch.Tensor) -> torch.Tensor:
        seen["kept"] = sum(kept.values())
        return torch.ones(len(sums_RS), 1, dtype=torch.float64)

    seen: dict[str, int] = {}
    forward_backward = MegatronSchedule().forward_backward
    forward_backward(stage.models, [with_own_shard(_stream(point, tokens=256))], ones)  # code and buffers are there
    batch = with_own_shard(_stream(point, tokens=point["tokens"]))
    give_back_freed_blocks()
    kept.clear()
    before, started = peak_bytes(), time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward_backward(stage.models, [batch], ones)
    segments = batch.segments if batch.shard is None else batch.shard.segments
    return {
        "seconds": time.perf_counter() - started,
        "kept_mib": seen["kept"] / MIB,
        "peak_mib": (peak_bytes() - before) / MIB,
        "pairs": float(sum(_pairs(segment) for segment in segments)),
    }


def _pairs(segment: Any) -> float:
    num_queries = segment.end - segment.start
    num_keys = segment.keys.stop - segment.keys.start + segment.prompt_end - segment.prompt_start
    return num_queries * (num_keys - (num_queries - 1) / 2)


def _stream(point: dict[str, Any], tokens: int) -> Any:
    """Prompts with two responses each until there are `tokens`, all of random ids."""
    import numpy as np

    from megadpo.data.batches.collate import collate_groups
    from megadpo.data.groups import Group

    random = np.random.default_rng(0)
    scale = min(1.0, tokens / (point["prompt"] + 2 * point["response"]))
    lengths = [int(scale * point[name]) for name in ("prompt", "response", "response")]
    groups = []
    for row in range(max(1, tokens // sum(lengths))):
        prompt, chosen, rejected = (random.integers(0, 512, length).astype(np.int32) for length in lengths)
        groups.append(Group((prompt,), (chosen, rejected), row))
    return collate_groups(groups, range(len(groups)), multiple_of=point["context"])


def _print(report: dict[str, Any], options: argparse.Namespace) -> None:
    one = {p["key_value_heads"]: p for p in report["points"] if p["method"] == "one rank"}
    print_table(
        f"A rank's activation memory, {options.tokens:,} tokens in groups of a {options.prompt:,}-token prompt with two "
        f"{options.response:,}-token responses, {options.layers} layers, hidden {options.hidden}, {options.heads} heads, "
        f"fp32; {options.context} context ranks against one",
        ["key-value heads", "way", "kept MiB", "ratio", "peak MiB", "ratio", "pairs over mean", "seconds"],
        [
            [
                point["key_value_heads"],
                point["method"],
                point["kept_mib"],
                point["kept_mib"] / one[point["key_value_heads"]]["kept_mib"],
                point["peak_mib"],
                point["peak_mib"] / one[point["key_value_heads"]]["peak_mib"],
                point["pairs_over_mean"],
                point["seconds"],
            ]
            for point in report["points"]
        ],
    )
