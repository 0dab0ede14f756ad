"""Cost of a step against pairs, length, vocabulary and depth, and on two processes.

Two tables. On one process: seconds of an optimizer step as pairs a step, sequence length, vocabulary, or depth double (which
should cost at most in proportion; attention alone grows faster with length). On two processes of one thread
each against one: the same batch with data, tensor and pipeline parallelism.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import add_shared, print_table
from benchmarks.ranks import on_ranks

BASE = {"pairs": 8, "length": 256, "vocabulary": 4096, "layers": 4}
LAYOUTS = [("one process", 1, {}), ("data 2", 2, {}), ("tensor 2", 2, {"tensor": 2}), ("pipeline 2", 2, {"pipeline": 2})]


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    report["growth"] = [_growth(what, options) for what in BASE]
    report["processes"] = _processes(options)
    _print(report)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, rounds=5, warm_up=1, hidden=256, tiny=False)
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 2, 4])
    parser.set_defaults(threads=1)


def _growth(what: str, options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds a step while `what` is multiplied."""
    points = [{**_base(options), what: factor * _base(options)[what]} for factor in options.factors]
    seconds = [statistics.median(_times(point, 1, {}, options)) for point in points]
    return {"what": what, "values": [point[what] for point in points], "seconds": seconds}


def _processes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The same batch on one process and on two, whole rounds of all layouts in turns."""
    found: dict[str, list[float]] = {name: [] for name, *_ in LAYOUTS}
    for _ in range(1 if options.tiny else 3):
        for name, num_ranks, parallel in LAYOUTS:
            found[name].append(statistics.median(_times(_base(options), num_ranks, parallel, options)))
    (one, *_) = found.values()
    ratios = {name: statistics.median(a / b for a, b in zip(one, of, strict=True)) for name, of in found.items()}
    return [{"layout": name, "seconds": statistics.median(found[name]), "speedup": ratios[name]} for name in found]


def _base(options: argparse.Namespace) -> dict[str, int]:
    return {name: max(2, value // 4) for name, value in BASE.items()} | {"vocabulary": 512} if options.tiny else BASE


def _times(point: dict[str, int], num_ranks: int, parallel: dict[str, int], options: argparse.Namespace) -> list[float]:
    """Seconds of the measured steps, of each the slowest rank's."""
    from benchmarks.runs import synthetic_config

    body = {"hidden_size": options.hidden, "intermediate_size": 2 * options.hidden, "num_attention_heads": 4}
    body["num_hidden_layers"] = point["layers"]
    with tempfile.TemporaryDirectory() as directory:
        config = synthetic_config(Path(directory), point["vocabulary"], body, point["pairs"], parallel)
        ranks = on_ranks(num_ranks, _steps, config, point, options)
    return [max(step) for step in zip(*ranks, strict=True)]


def _steps(config: dict[str, Any], point: dict[str, int], options: argparse.Namespace) -> list[float]:
    """Seconds of the measured steps on this rank."""
    import numpy as np
    import torch

    from benchmarks.runs import setup_on
    from megadpo.data.groups import Group
    from megadpo.parallel.world import joined_world
    from megadpo.training.run import Callbacks
    from megadpo.training.setup import prepare
    from megadpo.training.trainer import build, training_step
    from megadpo.validation.load import load_config

    torch.set_num_threads(options.threads)
    random = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        return random.integers(2, min(point["vocabulary"], 256), count).astype(np.int32)

    num_prompt, num_response = point["length"] // 2, point["length"] // 4
    num_steps = options.warm_up + options.rounds
    groups = [
        Group((tokens(num_prompt),), (tokens(num_response), tokens(num_response)), row)
        for row in range(num_steps * point["pairs"])
    ]
    setup, seconds = prepare(load_config(config)), []
    with joined_world(setup.layout, setup.config.train.seed):
        run = build(setup_on(setup, groups), Callbacks())
        for step in range(num_steps):
            started = time.perf_counter()
            training_step(run, step)
            seconds.append(time.perf_counter() - started)
    return seconds[options.warm_up :]


def _print(report: dict[str, Any]) -> None:
    print_table(
        "Seconds of a step on one process while one thing grows; growth: seconds' over the thing's, first to last",
        ["what", "values", "seconds", "growth"],
        [
            [
                growth["what"],
                ", ".join(map(str, growth["values"])),
                ", ".join(f"{seconds:.3g}" for seconds in growth["seconds"]),
                growth["seconds"][-1] / growth["seconds"][0] / (growth["values"][-1] / growth["values"][0]),
            ]
            for growth in report["growth"]
        ],
    )
    print_table(
        "Seconds of a step of the same batch, every process with one thread",
        ["layout", "seconds", "speed-up"],
        [[point["layout"], point["seconds"], point["speedup"]] for point in report["processes"]],
    )
