"""Memory of a training step against the length of a pair (--svg FILE draws it).

One optimizer step (frozen reference resident, policy forward and backward, AdamW) on one pair of random tokens, half of them
prompt and a quarter each response, on two processes of a fresh world each: context parallelism, pipeline parallelism, and
the first of these with the plain kernel of attention (`model.attention: sdpa`) as far as `--plain-to`. Figures are
the peak resident set of each process from its start to its end, everything included, and the slower process's seconds.

Every point is written as soon as it is measured; `--json` of a run that was cut short is gone on from.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import add_shared, print_table, write_json
from benchmarks.plot import line_chart
from benchmarks.ranks import on_ranks

GIB = 2**30
ARMS: dict[str, dict[str, Any]] = {
    "context 2": {"parallel": {"context": 2}},
    "pipeline 2": {"parallel": {"pipeline": 2}},
    "context 2, sdpa": {"parallel": {"context": 2}, "model": {"attention": "sdpa"}},
}


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    report["points"] = _known(options)
    done = {(point["arm"], point["tokens"]) for point in report["points"]}
    for tokens in options.tokens:
        for arm in options.arms:
            if (arm, tokens) in done or ("sdpa" in arm and tokens > options.plain_to):
                continue
            report["points"].append({"arm": arm, "tokens": tokens} | _point(arm, tokens, options))
            print(report["points"][-1], file=sys.stderr, flush=True)
            write_json(options.json, report)
    _print(report, options)
    if options.svg is not None:
        _draw(Path(options.svg), report, options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, hidden=256, layers=4, vocabulary=8192)
    parser.add_argument("--svg", metavar="FILE", help="draw memory against length there")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536], help="of the pair")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--plain-to", type=int, default=16384, help="most tokens with the plain kernel")
    parser.add_argument("--recompute", default="none", choices=["none", "selective", "full"])
    parser.set_defaults(threads=1)


def _known(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.json is None or not Path(options.json).is_file():
        return []
    points: list[dict[str, Any]] = json.loads(Path(options.json).read_text(encoding="utf-8"))["points"]
    return points


def _point(arm: str, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.runs import synthetic_config

    body = {"hidden_size": options.hidden, "intermediate_size": options.hidden * 11 // 4}
    body |= {"num_hidden_layers": options.layers, "num_attention_heads": max(2, options.hidden // 64)}
    with tempfile.TemporaryDirectory() as directory:
        config = synthetic_config(Path(directory), options.vocabulary, body, 1, ARMS[arm]["parallel"])
        path = Path(directory) / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": tokens}))
        config["model"] |= ARMS[arm].get("model", {})
        config["train"] |= {"tokens_per_micro_batch": max(tokens, 4096), "recompute": options.recompute}
        ranks = on_ranks(2, _step, config, tokens, options.threads)
    peaks = [rank["peak_gib"] for rank in ranks]
    return {
        "peak_gib": peaks,
        "sum_gib": sum(peaks),
        "before_gib": [rank["before_gib"] for rank in ranks],
        "seconds": max(rank["seconds"] for rank in ranks),
        "loss": ranks[-1]["loss"],
    }


def _step(config: dict[str, Any], tokens: int, num_threads: int) -> dict[str, float]:
    """A step on this rank: its peak resident set, before the step and in all."""
    import numpy as np
    import torch

    from benchmarks.head_point import peak_bytes
    from benchmarks.runs import setup_on
    from megadpo.data.groups import Group
    from megadpo.parallel.world import joined_world
    from megadpo.platform.allocator import give_back_freed_blocks
    from megadpo.training.run import Callbacks
    from megadpo.training.setup import prepare
    from megadpo.training.trainer import build, training_step
    from megadpo.validation.load import load_config

    give_back_freed_blocks()
    torch.set_num_threads(num_threads)
    random = np.random.default_rng(0)
    prompt, *responses = (random.integers(2, 256, tokens // part).astype(np.int32) for part in (2, 4, 4))
    setup = prepare(load_config(config))
    with joined_world(setup.layout, setup.config.train.seed, timeout_minutes=600):
        run = build(setup_on(setup, [Group((prompt,), tuple(responses), 0)]), Callbacks())
        before, started = peak_bytes(), time.perf_counter()
        record = training_step(run, 0)
        seconds = time.perf_counter() - started
    return {"peak_gib": peak_bytes() / GIB, "before_gib": before / GIB, "seconds": seconds, "loss": record["loss"]}


def _print(report: dict[str, Any], options: argparse.Namespace) -> None:
    print_table(
        f"A step on one pair on two processes; Llama, hidden {options.hidden}, {options.layers} layers, vocabulary "
        f"{options.vocabulary:,}, fp32, recompute {options.recompute}",
        ["tokens", "layout", "peak GiB of each process", "sum GiB", "seconds"],
        [
            [p["tokens"], p["arm"], ", ".join(f"{peak:.2f}" for peak in p["peak_gib"]), p["sum_gib"], p["seconds"]]
            for p in sorted(report["points"], key=lambda p: p["tokens"])
        ],
    )


def _draw(path: Path, report: dict[str, Any], options: argparse.Namespace) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in sorted(report["points"], key=lambda p: p["tokens"]):
        lines.setdefault(point["arm"], []).append((point["tokens"], point["sum_gib"]))
    title = f"Peak memory of a step on one pair, both processes together (hidden {options.hidden}, {options.layers} layers)"
    line_chart(path, title, "tokens of the pair", "GiB", lines)
