"""Time and memory of attention on the CPU: in blocks, by torch, with prompts twice, padded.

Forward and backward of one layer's attention over the same pairs, four ways: `cpu_flash` and `sdpa` (`model.attention`) over
the packed stream with shared prompts, `cpu_flash` with each prompt twice, and as padding trainers do: every
answer after its prompt in a row of its own, rows padded to the longest, torch's causal kernel without a mask. Times are of
interleaved rounds in one process, by the clock and of the processor (which a busy machine stretches less); memory is the
peak resident set above the operands, each way in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.common import add_shared, interleaved, median_ratio, print_table
from benchmarks.ranks import on_ranks

MIB = 2**20
WAYS = ("cpu_flash", "sdpa", "cpu_flash, prompts twice", "padded")
Step = Callable[[int], None]


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    report["points"] = [_point(case, options) for case in _cases(options)]
    print_table(
        f"Attention of one layer, forward + backward: {options.heads} heads of {options.head_dim}, "
        f"{options.key_value_heads} key-value heads, fp32",
        ["pairs", "way", "milliseconds", "over cpu_flash", "processor, over cpu_flash", "extra MiB"],
        [
            [
                point["case"],
                way,
                1000 * statistics.median(point["seconds"][way]),
                point["ratios"][way],
                point["processor_ratios"][way],
                point["mib"][way],
            ]
            for point in report["points"]
            for way in WAYS
        ],
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, heads=8, rounds=5)
    parser.add_argument("--pairs", type=int, default=16, help="of each mix of lengths")
    parser.add_argument("--mixes", nargs="*", default=["prompt-heavy", "UltraFeedback-like"])
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 8192, 16384], help="tokens of single pairs")
    parser.add_argument("--key-value-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)


def _cases(options: argparse.Namespace) -> list[tuple[str, int]]:
    """(name, number of pairs, or tokens of a single pair)."""
    return [*((mix, options.pairs) for mix in options.mixes), *(("one pair", length) for length in options.lengths)]


def _groups(case: tuple[str, int]) -> list[Any]:
    import numpy as np

    from benchmarks.material import synthetic_groups
    from megadpo.data.groups import Group

    name, size = case
    if name != "one pair":
        return synthetic_groups(name, size, vocab_size=300)
    return [Group((np.zeros(size // 2, np.int32),), (np.zeros(size // 4, np.int32),) * 2, 0)]


def _point(case: tuple[str, int], options: argparse.Namespace) -> dict[str, Any]:
    ((seconds, processor),) = on_ranks(1, _seconds, case, options)
    return {
        "case": f"{case[1]:,} {case[0]}" if case[0] != "one pair" else f"one of {case[1]:,} tokens",
        "seconds": seconds,
        "processor_seconds": processor,
        "ratios": {way: median_ratio(seconds[way], seconds["cpu_flash"]) for way in WAYS},
        "processor_ratios": {way: median_ratio(processor[way], processor["cpu_flash"]) for way in WAYS},
        "mib": {way: on_ranks(1, _extra_mib, case, way, options)[0] for way in WAYS},
    }


def _seconds(case: tuple[str, int], options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """By the clock, and of the processor."""
    import torch

    torch.set_num_threads(options.threads)
    processor: dict[str, list[float]] = {way: [] for way in WAYS}

    def arm(way: str) -> Step:
        step = _step(case, way, options)

        def timed(number: int) -> None:
            started = time.process_time()
            step(number)
            if number >= 0:
                processor[way].append(time.process_time() - started)

        return timed

    return interleaved({way: arm(way) for way in WAYS}, options.rounds, 1), processor


def _extra_mib(case: tuple[str, int], way: str, options: argparse.Namespace) -> float:
    import torch

    from benchmarks.head_point import peak_bytes
    from megadpo.platform.allocator import give_back_freed_blocks

    torch.set_num_threads(options.threads)
    _step(("one pair", 64), way, options)(0)  # threads and code are there before the peak is read
    step = _step(case, way, options)
    give_back_freed_blocks()
    before = peak_bytes()
    step(0)
    return (peak_bytes() - before) / MIB


def _step(case: tuple[str, int], way: str, options: argparse.Namespace) -> Step:
    """Forward and backward of this way; the operands' gradients are in place beforehand."""
    groups = _groups(case)
    return _padded_step(groups, options) if way == "padded" else _packed_step(groups, way, options)


def _packed_step(groups: list[Any], way: str, options: argparse.Namespace) -> Step:
    from megadpo.data.batches.collate import collate_groups
    from megadpo.model.attention.backends import backend_named

    name, _, twice = way.partition(",")
    backend = backend_named(name)
    micro_batch = collate_groups(groups, range(len(groups)), share_prompts=not twice)
    query, key, value, d_output = _operands((len(micro_batch.tokens_T),), options)
    prepared = backend.prepare(micro_batch.segments, None, key)  # once a micro-batch, for all layers

    def step(number: int) -> None:
        backend.attend(query, key, value, prepared, options.head_dim**-0.5).backward(d_output)

    return step


def _padded_step(groups: list[Any], options: argparse.Namespace) -> Step:
    import torch

    lengths = [len(group.prompts[0]) + len(response) for group in groups for response in group.responses]
    query, key, value, d_output = (x.transpose(1, 2) for x in _operands((len(lengths), max(lengths)), options))

    def step(number: int) -> None:
        sharing = options.heads != options.key_value_heads
        torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=sharing).backward(
            d_output
        )

    return step


def _operands(shape: tuple[int, ...], options: argparse.Namespace) -> list[Any]:
    """Query, key, value, with gradients to be added to, and the gradient of the output."""
    import torch

    operands = []
    for num_heads in (options.heads, options.key_value_heads, options.key_value_heads):
        operand = torch.randn(*shape, num_heads, options.head_dim).requires_grad_()
        operand.grad = torch.ones_like(operand)
        operands.append(operand)
    return [*operands, torch.randn(*shape, options.heads, options.head_dim)]
