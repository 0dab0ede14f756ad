"""Whole epochs with a cached reference against TRL's DPOTrainer: ``python -m benchmarks.epoch_against_trl [--json FILE]``.

Both arms compute the reference's log-probs of every pair first (TRL: ``precompute_ref_log_probs``; ours: ``reference.mode:
precomputed`` into an empty cache), then train; the clock runs over both. Whole runs take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import equal_start, interleaved, machine, median_ratio, print_table, write_json


def main() -> None:
    options = _options()
    equal_start(options.threads)
    import torch

    from benchmarks.runs import prepared_plan

    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {"command": "python -m benchmarks.epoch_against_trl " + " ".join(sys.argv[1:])}
    report["machine"] = machine()
    with tempfile.TemporaryDirectory() as directory:
        plan, report["model"] = prepared_plan(
            Path(directory), options.vocabulary, options.tiny, options.pairs, options.capacity, max_length=1024
        )
        report["points"] = [
            _point(plan, mix, num_epochs, options, Path(directory)) for mix in options.mixes for num_epochs in options.epochs
        ]
    _print(report, options)
    write_json(options.json, report)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write every figure there")
    parser.add_argument("--mixes", nargs="+", default=["hh-rlhf", "prompt-heavy", "UltraFeedback-like"])
    parser.add_argument("--epochs", type=int, nargs="+", default=[1])
    parser.add_argument("--batch-size", type=int, default=1, help="TRL's micro-batch, in pairs")
    parser.add_argument("--scoring-batch-size", type=int, help="TRL's while it precomputes; default: the same")
    parser.add_argument("--rounds", type=int, default=3, help="whole runs of each arm")
    parser.add_argument("--warm-up", type=int, default=1, help="runs of each arm before that")
    parser.add_argument("--steps", type=int, default=3, help="steps of an epoch")
    parser.add_argument("--pairs", type=int, default=8, help="pairs a step")
    parser.add_argument("--capacity", type=int, default=4096, help="tokens a micro-batch of megadpo's")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a toy model and short pairs, to see whether the tool works")
    return parser.parse_args()


def _point(plan: Any, mix: str, num_epochs: int, options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    from benchmarks.against_trl import pairs_of_mix, trl_trainer

    groups = pairs_of_mix(plan, mix, options.steps, options.pairs, options.tiny)
    num_steps = num_epochs * options.steps

    def theirs(number: int) -> None:
        with tempfile.TemporaryDirectory(dir=directory) as own:
            scoring = options.scoring_batch_size or options.batch_size
            settings = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": scoring}
            arguments = (str(plan.policy.path), groups, options.batch_size, options.pairs, num_steps, Path(own))
            trl_trainer(*arguments, **settings).train()

    def ours(number: int) -> None:
        with tempfile.TemporaryDirectory(dir=directory) as own:
            _train(plan, groups, num_steps, own)

    seconds = interleaved({"trl": theirs, "megadpo": ours}, options.rounds, options.warm_up)
    speedup = median_ratio(seconds["trl"], seconds["megadpo"])
    return {"mix": mix, "epochs": num_epochs, "seconds": seconds, "speedup": speedup}


def _train(plan: Any, groups: list[Any], num_steps: int, cache: str) -> None:
    """Our run from loading the model to the last step, into an empty cache."""
    from benchmarks.runs import plan_on
    from megadpo.parallel.world import joined_world
    from megadpo.training.run import Callbacks
    from megadpo.training.trainer import build, training_step

    own_plan = plan_on(plan, groups)
    own_plan.config.reference.mode, own_plan.config.data.cache_dir = "precomputed", cache
    with joined_world(plan.layout, plan.config.train.seed):
        run = build(own_plan, Callbacks())
        for step in range(num_steps):
            training_step(run, step)


def _print(report: dict[str, Any], options: argparse.Namespace) -> None:
    print(report["machine"])
    print_table(
        f"Seconds of a whole run, {options.steps} steps of {options.pairs} pairs an epoch, with the caching, fp32",
        ["pairs", "epochs", "TRL", "megadpo", "TRL / megadpo"],
        [
            [point["mix"], point["epochs"], *(statistics.median(s) for s in point["seconds"].values()), point["speedup"]]
            for point in report["points"]
        ],
    )


if __name__ == "__main__":
    main()
