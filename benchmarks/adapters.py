"""Seconds of a step and peak memory with LoRA adapters: against our training of the whole model, and TRL with PEFT.

Times are of one process in which the three take turns on the same pairs, in fp32: the whole model with a resident reference,
adapters whose reference is the model without them, and DPOTrainer with a `peft_config`, at its best micro-batch of those
tried. Memory is each one's in a process of its own: the peak resident set above what the imports take.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import MALLOC, MIXES, add_shared, median_ratio, print_table

MIB = 2**20
ARMS = ("whole", "adapters", "trl")


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    if options.arm:
        print(json.dumps(_peak(options)))
        return
    report["rank"] = options.rank
    report["mixes"] = [_mix(mix, options) for mix in options.mixes]
    _print(report)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, mixes=MIXES, rounds=3, warm_up=1, pairs=8, capacity=4096, vocabulary=8192, tiny=False)
    parser.add_argument("--rank", type=int, default=16, help="of the adapters, which are on every linear layer")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4], help="TRL's micro-batches, in pairs")
    parser.add_argument("--precomputed", action="store_true", help="the reference's log-probs are known in all arms")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)


def _mix(mix: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times and peaks on one mix of lengths."""
    by_batch_size: dict[int, Any] = {}
    for batch_size in options.batch_sizes:
        by_batch_size[batch_size] = {}
        for kind, seconds in zip(("", "cpu_"), _seconds(mix, batch_size, options), strict=True):
            ratios = {arm: median_ratio(seconds[arm], seconds["adapters"]) for arm in ("whole", "trl")}
            by_batch_size[batch_size] |= {f"{kind}seconds": seconds, f"{kind}ratios": ratios}
    best = min(by_batch_size, key=lambda size: statistics.median(by_batch_size[size]["seconds"]["trl"]))
    peaks = {arm: _in_own_process(arm, mix, options) for arm in ARMS}
    return {"mix": mix, "by_batch_size": by_batch_size, "best_batch_size": best, "peak_mib": peaks}


def _seconds(mix: str, batch_size: int, options: argparse.Namespace) -> list[dict[str, list[float]]]:
    """Of each arm's steps, in turns, warm-up left out; and processor seconds of this process, which others change less."""
    from transformers import TrainerCallback

    from benchmarks.against_trl import pairs_of_mix, trl_trainer
    from benchmarks.runs import prepared_setup, setup_on
    from megadpo.parallel.world import joined_world
    from megadpo.training.run import Callbacks
    from megadpo.training.trainer import build, training_step

    taken: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}

    def clocks() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def note(arm: str, started: tuple[float, float]) -> None:
        now = clocks()
        taken[arm].append((now[0] - started[0], now[1] - started[1]))

    num_steps = options.rounds + options.warm_up
    with tempfile.TemporaryDirectory() as name:
        setups = {arm: prepared_setup(Path(name) / arm, *_sizes(options), **_settings(arm, options))[0] for arm in ARMS[:2]}
        groups = pairs_of_mix(setups["whole"], mix, num_steps, options.pairs, options.tiny)
        with joined_world(setups["whole"].layout, setups["whole"].config.train.seed):
            runs = {arm: build(setup_on(setup, groups), Callbacks()) for arm, setup in setups.items()}

            class Turns(TrainerCallback):
                """Clocks each of TRL's steps, and lets ours follow it."""

                def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                    self.started = clocks()

                def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                    note("trl", self.started)
                    for arm, run in runs.items():
                        started = clocks()
                        training_step(run, len(taken[arm]))
                        note(arm, started)

            model, directory = str(setups["whole"].policy.path), Path(name)
            more = {"rank": options.rank, "precompute_ref_log_probs": options.precomputed}
            trainer = trl_trainer(model, groups, batch_size, options.pairs, num_steps, directory, **more)
            trainer.add_callback(Turns())
            trainer.train()
    return [{arm: [pair[n] for pair in pairs[options.warm_up :]] for arm, pairs in taken.items()} for n in (0, 1)]


def _sizes(options: argparse.Namespace) -> tuple[int, bool, int, int, int]:
    return options.vocabulary, options.tiny, options.pairs, options.capacity, 1024


def _settings(arm: str, options: argparse.Namespace) -> dict[str, Any]:
    made: dict[str, Any] = {} if arm == "whole" else {"adapter": {"kind": "lora", "rank": options.rank}}
    return made | ({"reference": "precomputed"} if options.precomputed else {})


def _in_own_process(arm: str, mix: str, options: argparse.Namespace) -> float:
    names = ("rank", "rounds", "pairs", "capacity", "vocabulary", "threads")
    command = [sys.executable, "-m", "benchmarks", "adapters", "--arm", arm, "--mixes", mix] + ["--tiny"] * options.tiny
    command += [word for name in names for word in (f"--{name}", str(getattr(options, name)))]
    command += ["--batch-sizes", str(min(options.batch_sizes)), *["--precomputed"] * options.precomputed]
    environment = {name: value for name, value in os.environ.items() if name not in MALLOC}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mib"])


def _peak(options: argparse.Namespace) -> dict[str, float]:
    """This process: the arm's steps, and the peak above imports; of TRL at its thriftiest micro-batch."""
    import torch

    from benchmarks.against_trl import pairs_of_mix, trl_trainer
    from benchmarks.memory_against_trl import resident_bytes, train
    from benchmarks.runs import prepared_setup, setup_on
    from megadpo.platform.allocator import give_back_freed_blocks

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        setup, _ = prepared_setup(Path(name), *_sizes(options), **_settings(options.arm, options))
        groups = pairs_of_mix(setup, options.mixes[0], options.rounds, options.pairs, options.tiny)
        import trl.trainer.dpo_trainer  # noqa: F401 - as much is imported in every arm

        give_back_freed_blocks()
        before = resident_bytes()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        if options.arm == "trl":
            sizes = options.batch_sizes[0], options.pairs, options.rounds
            more = {"rank": options.rank, "precompute_ref_log_probs": options.precomputed}
            trl_trainer(str(setup.policy.path), groups, *sizes, Path(name), **more).train()
        else:
            train(setup_on(setup, groups), options.rounds)
        return {"peak_mib": (_peak_bytes() - before) / MIB}


def _peak_bytes() -> int:
    """The largest resident set since it was begun anew; Linux."""
    (line,) = (line for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if "VmHWM" in line)
    return int(line.split()[1]) * 1024


def _print(report: dict[str, Any]) -> None:
    rows = []
    for mix in report["mixes"]:
        best, peaks = mix["by_batch_size"][mix["best_batch_size"]], mix["peak_mib"]
        seconds = [statistics.median(best["seconds"][arm]) for arm in ARMS]
        ratios = [1 / best["ratios"]["whole"], 1 / best["cpu_ratios"]["whole"], best["ratios"]["trl"]]
        rows.append([mix["mix"], *seconds, mix["best_batch_size"], *ratios, *(peaks[arm] for arm in ARMS)])
    heads = ["pairs", "whole model", "adapters", "TRL + PEFT", "its best batch"]
    heads += ["adapters / whole", "in processor seconds", "TRL / adapters"]
    print_table(
        f"Seconds a step, adapters of rank {report['rank']} on every linear layer, fp32; peak MiB above the imports",
        [*heads, *(f"MiB, {arm}" for arm in ARMS)],
        rows,
    )
