"""What bf16 gains, and what compiling the small operations would.

Seconds of whole optimizer steps (resident reference) in fp32 and in bf16 with fp32 master weights, taking turns on the same
pairs. Then RMSNorm, rope and SwiGLU, forward and backward on a packed stream: as they run here, as torch's operations one
after the other, and as torch.compile makes one of these (lengths left open, as streams differ). Milliseconds, the seconds
until the first call is done, and how far the results of the last two are apart. ``--pieces-only`` leaves the steps out.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.common import add_shared, interleaved, median_ratio, print_table


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    if not options.pieces_only:
        report["steps"] = _steps(options)
    if not options.steps_only:
        report["pieces"] = [
            _piece(name, dtype, options) for name in ("RMSNorm", "rope", "SwiGLU") for dtype in ("fp32", "bf16")
        ]
    _print(report)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, rounds=6, pairs=16, vocabulary=8192, hidden=512, tiny=False)
    parser.add_argument("--capacity", type=int, default=4096, help="tokens a micro-batch, and of a piece's stream")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--pieces-only", action="store_true", help="leave the steps out")
    only.add_argument("--steps-only", action="store_true", help="leave the pieces out")


def _steps(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from benchmarks.runs import prepared_setup
    from megadpo.parallel.world import joined_world

    with tempfile.TemporaryDirectory() as directory:
        setup, about = prepared_setup(Path(directory), options.vocabulary, options.tiny, options.pairs, options.capacity)
        with joined_world(setup.layout, setup.config.train.seed):
            from megadpo.training.run import Callbacks, Run
            from megadpo.training.trainer import build, training_step

            runs = {
                name: build(dataclasses.replace(setup, dtype=dtype), Callbacks())
                for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
            }
            losses: dict[str, list[float]] = {name: [] for name in runs}

            def arm(name: str, run: Run) -> Any:
                return lambda number: losses[name].append(training_step(run, number % options.rounds)["loss"])

            seconds = interleaved({name: arm(name, run) for name, run in runs.items()}, options.rounds, 2)
    return {
        "model": about,
        "seconds": seconds,
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "time_ratio": median_ratio(seconds["bf16"], seconds["fp32"]),
        "losses": losses,
    }


def _piece(name: str, dtype_name: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype_name]
    torch.manual_seed(0)
    ours, function, inputs = _functions(name, dtype, options)
    torch._dynamo.reset()
    torch._inductor.config.force_disable_caches = True  # what a machine pays that has not run it before
    compiled = torch.compile(function, dynamic=True)

    def run(way: Any, number: int = 0) -> list[torch.Tensor]:
        for tensor in inputs:
            tensor.grad = None
        output = way(*inputs)
        output.backward(torch.ones_like(output))
        return [output.detach(), *(tensor.grad for tensor in inputs)]

    started = time.perf_counter()
    found = run(compiled)
    first_call = time.perf_counter() - started
    expected = run(function)
    arms = {
        "here": lambda number: run(ours),
        "torch": lambda number: run(function),
        "compiled": lambda number: run(compiled),
    }
    seconds = interleaved(arms, options.rounds, 2)
    pairs = zip(found, expected, strict=True)
    return {
        "piece": name,
        "dtype": dtype_name,
        "milliseconds": {arm: 1000 * statistics.median(values) for arm, values in seconds.items()},
        "time_ratio": median_ratio(seconds["compiled"], seconds["here"]),
        "first_call_seconds": first_call,
        "apart": max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs),
    }


def _functions(name: str, dtype: Any, options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The piece as a layer runs it, the same of torch's operations, and leaves to run it on."""
    import torch
    import torch.nn.functional as F

    from megadpo.platform.megatron_cpu import prepare_megatron

    prepare_megatron()
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    num_tokens, hidden = options.capacity, options.hidden

    def leaf(*shape: int) -> Any:
        return torch.randn(shape).to(dtype).requires_grad_()

    if name == "RMSNorm":
        from megadpo.model.norm import RMSNorm

        settings = SimpleNamespace(use_cpu_initialization=True, params_dtype=dtype, sequence_parallel=False)
        norm = RMSNorm(settings, hidden)
        return (
            lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, (x,)),
            lambda x, weight: F.rms_norm(x, (hidden,), weight, 1e-5),
            [leaf(num_tokens, 1, hidden), leaf(hidden)],
        )
    if name == "rope":
        angles = torch.outer(torch.arange(num_tokens).float(), 10000.0 ** -(torch.arange(32) / 32))
        angles = torch.cat([angles, angles], dim=-1)[:, None, None, :]

        def rope(query: Any) -> Any:
            return _apply_rotary_pos_emb_bshd(query, angles)

        return rope, rope, [leaf(num_tokens, 1, hidden // 64, 64)]
    from megadpo.model.swiglu import SwiGLU

    def swiglu(x: Any) -> Any:
        gate, up = torch.chunk(x, 2, dim=-1)
        return F.silu(gate) * up

    return SwiGLU(), swiglu, [leaf(num_tokens, 1, 2 * (hidden * 11 // 4))]


def _print(report: dict[str, Any]) -> None:
    if "steps" in report:
        steps = report["steps"]
        print_table(
            f"Seconds a step, Llama with {steps['model']['body_parameters'] / 1e6:.1f} M body parameters and a vocabulary "
            f"of {steps['model']['vocabulary']:,}, resident reference",
            ["fp32", "bf16", "time ratio", "last loss fp32", "last loss bf16"],
            [[*steps["median_seconds"].values(), steps["time_ratio"], *(values[-1] for values in steps["losses"].values())]],
        )
    if "pieces" in report:
        print_table(
            "Forward and backward of the small operations",
            ["operation", "dtype", "here, ms", "torch, ms", "compiled, ms", "compiled / here", "first call, s", "apart"],
            [
                [p["piece"], p["dtype"], *p["milliseconds"].values(), p["time_ratio"], p["first_call_seconds"], p["apart"]]
                for p in report["pieces"]
            ],
        )
