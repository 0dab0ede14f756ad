"""Peak memory of training against TRL's DPOTrainer.

Each arm trains some steps in a process of its own, with a live reference in fp32, on the same pairs. "Extra" is the peak
resident set above what the imports and the two models' weights take: activations, logits, gradients, optimizer states.
TRL is measured at each micro-batch size given; 1 is its thriftiest. Both arms give freed blocks back at once, so
that the peak is what was alive.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import MIXES, add_shared, print_table

MIB = 2**20


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    if options.arm:
        print(json.dumps(_measure(options)))
        return
    report["mixes"] = [_mix(mix, options) for mix in options.mixes]
    _print(report, options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, mixes=MIXES, pairs=8, vocabulary=8192, tiny=False)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4], help="TRL's micro-batches, in pairs")
    parser.add_argument("--steps", type=int, default=2, help="the first has no optimizer states yet")
    parser.add_argument("--capacities", type=int, nargs="+", default=[2048, 4096], help="tokens of our micro-batches")
    parser.add_argument("--arm", choices=["megadpo", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)


def _mix(mix: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every arm at every size, each in a fresh process."""
    arms = {"trl": options.batch_sizes, "megadpo": options.capacities}
    found = {arm: {size: _arm(arm, size, mix, options) for size in sizes} for arm, sizes in arms.items()}
    least = {arm: min(point["extra_mib"] for point in points.values()) for arm, points in found.items()}
    return {"mix": mix, **found, "ratio_of_least": least["megadpo"] / least["trl"]}


def _arm(arm: str, size: int, mix: str, options: argparse.Namespace) -> dict[str, float]:
    sizes = {name: getattr(options, name) for name in ("pairs", "steps", "vocabulary", "threads")}
    command = [sys.executable, "-m", "benchmarks", "memory_against_trl", "--arm", arm, "--size", str(size), "--mixes", mix]
    command += [word for name, value in sizes.items() for word in (f"--{name}", str(value))] + ["--tiny"] * options.tiny
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(options: argparse.Namespace) -> dict[str, float]:
    """This process: the arm's steps, and the peak above imports and weights."""
    import torch

    from benchmarks.against_trl import pairs_of_mix, trl_trainer
    from benchmarks.head_point import peak_bytes
    from benchmarks.runs import prepared_setup, setup_on
    from megadpo.platform.allocator import give_back_freed_blocks

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as directory:
        capacity = options.size if options.arm == "megadpo" else 4096
        setup, about = prepared_setup(
            Path(directory), options.vocabulary, options.tiny, options.pairs, capacity, max_length=1024
        )
        groups = pairs_of_mix(setup, options.mixes[0], options.steps, options.pairs, options.tiny)
        weights = 2 * 4 * (about["body_parameters"] + 2 * about["vocabulary"] * setup.policy.config.hidden_size)
        if options.arm == "trl":
            import trl.trainer.dpo_trainer  # noqa: F401
        give_back_freed_blocks()
        before = resident_bytes()
        if options.arm == "trl":
            trl_trainer(str(setup.policy.path), groups, options.size, options.pairs, options.steps, Path(directory)).train()
        else:
            train(setup_on(setup, groups), options.steps)
        return {
            "extra_mib": (peak_bytes() - before - weights) / MIB,
            "before_mib": before / MIB,
            "weights_mib": weights / MIB,
        }


def train(setup: Any, num_steps: int) -> None:
    """Steps of our trainer."""
    from megadpo.parallel.world import joined_world
    from megadpo.training.run import Callbacks
    from megadpo.training.trainer import build, training_step

    with joined_world(setup.layout, setup.config.train.seed):
        run = build(setup, Callbacks())
        for step in range(num_steps):
            training_step(run, step)


def resident_bytes() -> int:
    """Resident now, once the memory of a first small product (threads, buffers) is there; Linux."""
    import torch

    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def _print(report: dict[str, Any], options: argparse.Namespace) -> None:
    for mix in report["mixes"]:
        rows = [
            [arm, f"{size} {unit}", point["extra_mib"]]
            for arm, unit in (("trl", "pairs"), ("megadpo", "tokens"))
            for size, point in mix[arm].items()
        ]
        print_table(
            f"{mix['mix']}: extra MiB of {options.steps} steps of {options.pairs} pairs, live reference, fp32; "
            f"least of ours / least of TRL's: {mix['ratio_of_least']:.3f}",
            ["arm", "micro-batch", "extra MiB"],
            rows,
        )
