"""Whole epochs with a precomputed reference against TRL's DPOTrainer.

Both arms compute the reference's log-probs of every pair first (TRL: ``precompute_ref_log_probs``; ours: ``reference.mode:
precomputed`` into an empty cache), then train; the clock runs over both. Whole runs take turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import MIXES, add_shared, interleaved, median_ratio, print_table


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    from benchmarks.runs import prepared_setup

    with tempfile.TemporaryDirectory() as directory:
        setup, report["model"] = prepared_setup(
            Path(directory), options.vocabulary, options.tiny, options.pairs, options.capacity, max_length=1024
        )
        report["points"] = [
            _point(setup, mix, num_epochs, options, Path(directory))
            for mix in options.mixes
            for num_epochs in options.epochs
        ]
    _print(report, options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, mixes=MIXES, rounds=3, warm_up=1, pairs=8, capacity=4096, vocabulary=8192, tiny=False)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1])
    parser.add_argument("--batch-size", type=int, default=1, help="TRL's micro-batch, in pairs")
    parser.add_argument("--scoring-batch-size", type=int, help="TRL's while it precomputes; default: the same")
    parser.add_argument("--steps", type=int, default=3, help="steps of an epoch")


def _point(setup: Any, mix: str, num_epochs: int, options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    from benchmarks.against_trl import pairs_of_mix, trl_trainer

    groups = pairs_of_mix(setup, mix, options.steps, options.pairs, options.tiny)
    num_steps = num_epochs * options.steps

    def theirs(number: int) -> None:
        with tempfile.TemporaryDirectory(dir=directory) as own:
            scoring = options.scoring_batch_size or options.batch_size
            settings = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": scoring}
            arguments = (str(setup.policy.path), groups, options.batch_size, options.pairs, num_steps, Path(own))
            trl_trainer(*arguments, **settings).train()

    def ours(number: int) -> None:
        with tempfile.TemporaryDirectory(dir=directory) as own:
            _train(setup, groups, num_steps, own)

    seconds = interleaved({"trl": theirs, "megadpo": ours}, options.rounds, options.warm_up)
    speedup = median_ratio(seconds["trl"], seconds["megadpo"])
    return {"mix": mix, "epochs": num_epochs, "seconds": seconds, "speedup": speedup}


def _train(setup: Any, groups: list[Any], num_steps: int, cache: str) -> None:
    """Our run from loading the model to the last step, into an empty cache."""
    from benchmarks.runs import setup_on
    from megadpo.parallel.world import joined_world
    from megadpo.training.run import Callbacks
    from megadpo.training.trainer import build, training_step

    own_setup = setup_on(setup, groups)
    own_setup.config.reference.mode, own_setup.config.data.cache_dir = "precomputed", cache
    with joined_world(setup.layout, setup.config.train.seed):
        run = build(own_setup, Callbacks())
        for step in range(num_steps):
            training_step(run, step)


def _print(report: dict[str, Any], options: argparse.Namespace) -> None:
    print_table(
        f"Seconds of a whole run, {options.steps} steps of {options.pairs} pairs an epoch, with the caching, fp32",
        ["pairs", "epochs", "TRL", "megadpo", "TRL / megadpo"],
        [
            [point["mix"], point["epochs"], *(statistics.median(s) for s in point["seconds"].values()), point["speedup"]]
            for point in report["points"]
        ],
    )
