"""What the further forward passes of coupled objectives cost.

Whole optimizer steps of the trainer on preference rows, an objective that needs more than one pass in turns with its nearest
relative that does not, on the same rows in the same order, fp32, reference resident.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import add_shared, interleaved, median_ratio, print_table

COMPARED: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("all of the batch's pairs, twice through the policy", {"loss_type": "sigmoid"}, {"loss_type": "aot"}),
    ("running delta, the same", {"loss_type": "bco_pair"}, {"loss_type": "bco_pair", "bco_running_delta": True}),
    ("KL of one mismatched answer a row", {"loss_type": "apo_zero_unpaired"}, {"loss_type": "kto"}),
)


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    from benchmarks.runs import prepared_setup
    from megadpo.parallel.world import joined_world

    with tempfile.TemporaryDirectory() as directory:
        setup, report["model"] = prepared_setup(
            Path(directory), options.vocabulary, options.tiny, options.pairs, options.capacity
        )
        report |= {"pairs_per_step": options.pairs, "tokens_per_micro_batch": options.capacity}
        with joined_world(setup.layout, setup.config.train.seed):
            report["times"] = [_times(setup, what, plain, coupled, options) for what, plain, coupled in COMPARED]
    _print(report)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, rounds=7, warm_up=2, pairs=16, capacity=4096, vocabulary=8192, tiny=False)


def _times(
    setup: Any, what: str, plain: dict[str, Any], coupled: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of interleaved steps of both objectives, on one model, as `setup` is."""
    from megadpo.config.schema import ObjectiveConfig
    from megadpo.training.run import Callbacks
    from megadpo.training.setup import prepare
    from megadpo.training.trainer import build, training_step

    arms = {}
    for name, objective in (("plain", plain), ("coupled", coupled)):
        changes = {"objective": ObjectiveConfig(**objective), "output_dir": f"{setup.config.output_dir}-{name}"}
        run = build(prepare(dataclasses.replace(setup.config, **changes)), Callbacks())
        arms[name] = lambda number, run=run: training_step(run, number % options.rounds)
    seconds = interleaved(arms, options.rounds, options.warm_up)
    return {
        "what": what,
        "plain": plain["loss_type"],
        "coupled": coupled["loss_type"],
        "seconds": seconds,
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "time_ratio": median_ratio(seconds["coupled"], seconds["plain"]),
    }


def _print(report: dict[str, Any]) -> None:
    rows = [
        [t["coupled"], t["plain"], t["what"], t["median_seconds"]["coupled"], t["median_seconds"]["plain"], t["time_ratio"]]
        for t in report["times"]
    ]
    model = report["model"]
    print_table(
        f"Seconds a step of {report['pairs_per_step']} pairs, Llama with {model['body_parameters'] / 1e6:.1f} M body "
        f"parameters and a vocabulary of {model['vocabulary']:,}, fp32; ratios are medians over interleaved steps",
        ["objective", "against", "extra", "seconds", "seconds against", "time ratio"],
        rows,
    )
