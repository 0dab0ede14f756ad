"""What recomputing activations and moving them away saves and costs.

One forward and backward of a packed stream of prompts with two responses each. Memory is of a process of its own for each
way: the resident set above what it held before, when the forward pass is over (what waits for the backward pass) and at its
peak. Times are of one process in which the ways take turns. With --directory in shared memory (/dev/shm) what is moved away
stays in memory, but is counted as the file's and not as the process's. The "engine" ways are kept activations under
Megatron's engine, whose gradients are added up outside autograd: by its hooks, or weights' by the products that make them
("fused").
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import add_shared, interleaved, median_ratio, print_table

MIB = 2**20


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        settings = {**vars(options), "directory": directory}
        points = {way: _in_a_fresh_process("_memory", {**settings, "way": way}) for way in _ways(settings)}
        seconds = _in_a_fresh_process("_seconds", settings) if options.rounds else {}
    report["points"] = [{"way": way, **memory} for way, memory in points.items()]
    for point in report["points"] if seconds else ():
        own = seconds[point["way"]]
        point |= {"seconds": statistics.median(own), "time_ratio": median_ratio(own, seconds["kept"])}
    report["seconds"] = seconds
    _print(report, options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, hidden=512, layers=8, heads=8, rounds=3)
    parser.add_argument("--directory", help="where activations are moved to; default: the directory for temporary files")
    parser.add_argument("--tokens", type=int, default=4096, help="of the stream")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--window-mib", type=int, default=32, help="train.activation_offload_window_mib")
    parser.add_argument("--ways", nargs="+", metavar="WAY", help="only these, as the table names them; kept is always there")


def _ways(settings: dict[str, Any]) -> dict[str, Any]:
    from megadpo.model.activations import Activations

    half = settings["layers"] // 2
    away = {
        "offload": "disk",
        "offload_dir": Path(settings["directory"]),
        "offload_window_mib": settings["window_mib"],
    }
    ways = {
        "kept": Activations(),
        "recompute small": Activations("small"),
        "recompute selective": Activations("selective"),
        f"recompute full, block of {half}": Activations("full", "block", half),
        "recompute full": Activations("full"),
        "recompute full, units of 2": Activations("full", recompute_num_layers=2),
        "offload disk": Activations(**away),
        "recompute small, offload disk": Activations("small", **away),
        "recompute selective, offload disk": Activations("selective", **away),
        "recompute full, offload disk": Activations("full", **away),
    }
    all_ways = {name: (way, None) for name, way in ways.items()}
    all_ways |= {"engine": (Activations(), False), "engine, fused": (Activations(), True)}
    return {name: way for name, way in all_ways.items() if settings["ways"] is None or name in ("kept", *settings["ways"])}


def _in_a_fresh_process(function: str, settings: dict[str, Any]) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.preload"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(function, settings, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit(f"the process of {settings.get('way', 'the times')} failed: its own error is above") from None
    finally:
        process.join()


def _answer(function: str, settings: dict[str, Any], sender: Any) -> None:
    import torch

    from megadpo.parallel.layout import Layout
    from megadpo.parallel.world import joined_world

    torch.set_num_threads(settings["threads"])
    with joined_world(Layout(), seed=0):
        sender.send({"_memory": _memory, "_seconds": _seconds}[function](settings))


def _memory(settings: dict[str, Any]) -> dict[str, float]:
    from megadpo.platform.allocator import give_back_freed_blocks

    give_back_freed_blocks()
    stage, step = stage_and_step(settings, *_ways(settings)[settings["way"]])
    step(256, lambda: None)  # code, buffers and gradients are there
    moved_before = 0 if stage.offloader is None else stage.offloader.num_bytes_moved
    seen: dict[str, int] = {}
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    step(settings["tokens"], lambda: seen.update(kept=_status_bytes("VmRSS")))
    return {
        "kept_mib": (seen["kept"] - before) / MIB,
        "peak_mib": (_status_bytes("VmHWM") - before) / MIB,
        "moved_mib": 0 if stage.offloader is None else (stage.offloader.num_bytes_moved - moved_before) / MIB,
    }


def _status_bytes(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _seconds(settings: dict[str, Any]) -> dict[str, list[float]]:
    steps = {name: stage_and_step(settings, *way)[1] for name, way in _ways(settings).items()}

    def arm(step: Any) -> Any:
        return lambda number: step(settings["tokens"], lambda: None)

    return interleaved({way: arm(step) for way, step in steps.items()}, settings["rounds"], 1)


def stage_and_step(settings: dict[str, Any], way: Any, fusion: bool | None = None) -> tuple[Any, Any]:
    """A stage, and its forward and backward of so many tokens: step(tokens, what to do when the forward pass is over).

    Args:
        fusion: under the Megatron engine, with this `parallel.gradient_accumulation_fusion`; None: without an engine.
    """
    import torch
    from transformers import LlamaConfig

    from benchmarks.material import synthetic_groups
    from megadpo.config.schema import ParallelConfig, TrainConfig
    from megadpo.data.batches.collate import collate_groups
    from megadpo.model.build import build_stage
    from megadpo.model.families import shape_of
    from megadpo.parallel.layout import Layout
    from megadpo.pipeline.megatron_schedule import MegatronSchedule
    from megadpo.platform.device import compute_device

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=settings["hidden"],
        intermediate_size=settings["hidden"] * 11 // 4,
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        max_position_embeddings=settings["tokens"],
    )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings["dtype"]]
    stage = build_stage(shape_of(config), Layout(), dtype, way)
    with torch.no_grad():
        for parameter in stage.model.parameters():
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)

    run = functools.partial(MegatronSchedule().forward_backward, stage.models)
    if fusion is not None:
        from megadpo.engine.megatron import MegatronEngine

        run = MegatronEngine(stage, TrainConfig(), ParallelConfig(gradient_accumulation_fusion=fusion)).forward_backward

    def step(num_tokens: int, forward_is_over: Any) -> None:
        groups = synthetic_groups("UltraFeedback-like", num_tokens // 64, 512)
        ends = [
            sum(len(ids) for group in groups[: count + 1] for ids in (*group.prompts, *group.responses))
            for count in range(len(groups))
        ]
        count = max(1, sum(end <= num_tokens for end in ends))

        def ones(number: int, sums_RS: torch.Tensor) -> torch.Tensor:
            forward_is_over()
            return torch.ones(len(sums_RS), 1, dtype=torch.float64, device=sums_RS.device)

        run([collate_groups(groups[:count], range(count)).to(compute_device())], ones)

    return stage, step


def _print(report: dict[str, Any], options: argparse.Namespace) -> None:
    kept = report["points"][0]
    print_table(
        f"Forward and backward of {options.tokens:,} tokens, {options.layers} layers, hidden {options.hidden}, "
        f"{options.heads} heads, {options.dtype}, window {options.window_mib} MiB",
        ["activations", "kept MiB", "ratio", "peak MiB", "ratio", "moved MiB", "seconds", "time ratio"],
        [
            [
                point["way"],
                point["kept_mib"],
                point["kept_mib"] / kept["kept_mib"],
                point["peak_mib"],
                point["peak_mib"] / kept["peak_mib"],
                point["moved_mib"],
                point.get("seconds", "-"),
                point.get("time_ratio", "-"),
            ]
            for point in report["points"]
        ],
    )
