"""What prompt sharing pays on preference rows: tokens and seconds.

Tokens: every usable row under an 8k byte-level BPE trained on the rows. Time: whole optimizer steps of the trainer
(`megadpo.training.trainer.training_step`), with and without sharing in turns, on the same pairs in the same order, fp32.

The bound is of the cost model: with r = prompt / completion length, sharing gains at most 2 (r + 1) / (r + 2).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import add_shared, interleaved, median_ratio, print_table


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    from benchmarks.material import preference_file
    from benchmarks.runs import prepared_setup

    with tempfile.TemporaryDirectory() as directory:
        setup, report["model"] = prepared_setup(
            Path(directory), options.vocabulary, options.tiny, options.pairs, options.capacity
        )
        report |= {
            "data": preference_file(Path(directory))[1],
            "rows": setup.reports["train"].to_dict(),
            "pairs_per_step": options.pairs,
            "tokens_per_micro_batch": options.capacity,
        }
        report["tokens"] = _tokens(setup.train.groups)
        report["times"] = [_times(setup, mode, options) for mode in ("resident", "none")]
    _print(report)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, rounds=7, warm_up=2, pairs=16, capacity=4096, vocabulary=8192, tiny=False)


def _tokens(groups: Any, numbers: Any = slice(None)) -> dict[str, float]:
    """Tokens through the model a pair, over the groups `numbers`."""
    with_sharing, without = (int(groups.num_tokens(share)[numbers].sum()) for share in (True, False))
    num_pairs = len(groups.num_tokens(True)[numbers])
    return {
        "pairs": num_pairs,
        "per_pair_shared": with_sharing / num_pairs,
        "per_pair_unshared": without / num_pairs,
        "ratio": with_sharing / without,
    }


def _times(setup: Any, reference: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of interleaved steps, with a resident reference or with none to compute."""
    from megadpo.parallel.world import joined_world

    with joined_world(setup.layout, setup.config.train.seed):
        return _times_in_world(setup, reference, options)


def _times_in_world(setup: Any, reference: str, options: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from megadpo.training.reference import PrecomputedReference, References
    from megadpo.training.run import Callbacks, Run
    from megadpo.training.setup import data_packing
    from megadpo.training.trainer import build, training_step

    run = build(setup, Callbacks())
    if reference == "none":
        zeros = PrecomputedReference(np.zeros(setup.train.groups.num_responses), setup.train.groups)
        run.references = References(zeros, None)
    unshared_config = dataclasses.replace(setup.config, data=dataclasses.replace(setup.config.data, share_prompts=False))
    unshared_packing = data_packing(
        unshared_config, setup.train.groups, setup.layout, setup.policy.shape, options.capacity, "--capacity"
    )
    unshared = dataclasses.replace(run, setup=dataclasses.replace(setup, config=unshared_config, train=unshared_packing))

    def step(which: Run, number: int) -> None:
        training_step(which, number % options.rounds)  # warm-up rounds (-1, -2, …) see the last rounds' pairs

    arms = {"unshared": lambda number: step(unshared, number), "shared": lambda number: step(run, number)}
    seconds = interleaved(arms, options.rounds, options.warm_up)
    numbers = np.concatenate([setup.sampler.group_ids(number) for number in range(options.rounds)])
    tokens = _tokens(setup.train.groups, numbers)
    ratio, gain = (median_ratio(seconds[a], seconds[b]) for a, b in (("shared", "unshared"), ("unshared", "shared")))
    return {
        "reference": reference,
        "seconds": seconds,
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "tokens": tokens,
        "time_ratio": ratio,
        "gain": gain,
        "bound": 1 / tokens["ratio"],
        "gain_to_bound": gain * tokens["ratio"],
    }


def _print(report: dict[str, Any]) -> None:
    tokens, model = report["tokens"], report["model"]
    print(report["data"])
    print_table(
        "Tokens through the model a pair, all usable rows",
        ["pairs", "without sharing", "with sharing", "ratio"],
        [[tokens["pairs"], tokens["per_pair_unshared"], tokens["per_pair_shared"], tokens["ratio"]]],
    )
    rows = [
        [
            t["reference"],
            t["median_seconds"]["unshared"],
            t["median_seconds"]["shared"],
            t["time_ratio"],
            t["tokens"]["ratio"],
            t["gain"],
            t["bound"],
            t["gain_to_bound"],
        ]
        for t in report["times"]
    ]
    print_table(
        f"Seconds a step of {report['pairs_per_step']} pairs, Llama with {model['body_parameters'] / 1e6:.1f} M body "
        f"parameters and a vocabulary of {model['vocabulary']:,}, fp32; ratios are medians over interleaved steps",
        ["reference", "without sharing", "with sharing", "time ratio", "token ratio", "gain", "bound", "gain / bound"],
        rows,
    )
