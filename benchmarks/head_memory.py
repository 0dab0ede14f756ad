"""Memory and time of log-probs at a large vocabulary against log_softmax + gather.

Memory: the peak resident set of a log-prob step over the head (hidden states in, log-probs out; and with its backward),
above what the process held with inputs, weights and weight gradient in place. Each point is a process of its own, as
getrusage only ever reports the most. The plain way beside it is torch's log_softmax + gather over the same tokens.

Time: forward and backward of the head against the plain way, where half of the stream's tokens are completion tokens:
the plain way projects all of them, ours only those that are scored. Once more for the forward pass alone, as a frozen
reference runs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from typing import Any

from benchmarks.common import add_shared, print_table

MIB = 2**20


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    report["vocabulary"], report["hidden"] = options.vocabulary, options.hidden
    report["memory"] = _memory(options)
    report["half_scored"] = _half_scored(options, backward=True)
    report["half_scored_forward"] = _half_scored(options, backward=False)
    _print(report)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, vocabulary=131072, hidden=512, rounds=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096, 8192], help="completion tokens")
    parser.add_argument("--half-tokens", type=int, default=1024, help="stream tokens where half are scored")
    parser.add_argument("--half-hidden", type=int, default=1024)
    parser.add_argument("--half-vocabulary", type=int, default=151936)
    parser.add_argument("--kernels", choices=["auto", "torch", "native"], default="auto", help="model.kernels of our head")
    parser.add_argument("--tile-mib", type=int, help="memory of a tile of our head; default: as in training")


def _memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A point for every way, pass and number of completion tokens."""
    points = []
    for num_tokens in options.tokens:
        for way in ("megadpo", "log_softmax + gather"):
            for backward in (False, True):
                point = {
                    "way": way,
                    "tokens": num_tokens,
                    "scored": num_tokens,
                    "hidden": options.hidden,
                    "vocabulary": options.vocabulary,
                    "backward": backward,
                    "kernels": options.kernels,
                    "tile_mib": options.tile_mib,
                }
                points.append(point | _in_own_process(point))
    return points


def _half_scored(options: argparse.Namespace, backward: bool) -> dict[str, Any]:
    point = {
        "tokens": options.half_tokens,
        "scored": options.half_tokens // 2,
        "hidden": options.half_hidden,
        "vocabulary": options.half_vocabulary,
        "backward": backward,
        "kernels": options.kernels,
        "tile_mib": options.tile_mib,
    }
    extra = {way: _in_own_process(point | {"way": way}).get("extra_mib") for way in ("megadpo", "log_softmax + gather")}
    times = _in_own_process(point | {"way": "both", "rounds": options.rounds})
    ours, plain = extra.values()
    return point | times | {"extra_mib": extra, "memory_ratio": ours / plain if ours and plain else None}


def _in_own_process(point: dict[str, Any]) -> dict[str, Any]:
    """Measure a point in a fresh process, forked from one that has imported the libraries and computed nothing.

    A point that this machine has no memory for is left out, and says so.
    """
    needed = 4 * 4 * point["tokens"] * point["vocabulary"] if point["way"] != "megadpo" else 0
    if needed > _available_bytes():
        return {"skipped": f"needs about {needed / 2**30:.0f} GiB, {_available_bytes() / 2**30:.0f} GiB are free"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.head_point"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        return pool.apply(_measure, (point,))


def _measure(point: dict[str, Any]) -> dict[str, Any]:
    # Imported by the fork server already; in this process it would only cost time and memory.
    from benchmarks.head_point import measure

    return measure(point)


def _available_bytes() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _print(report: dict[str, Any]) -> None:
    points = report["memory"]

    def extra(num_tokens: int, way: str, backward: bool) -> Any:
        (found,) = (p for p in points if (p["tokens"], p["way"], p["backward"]) == (num_tokens, way, backward))
        return found.get("extra_mib", "too large")

    ways = [(way, backward) for way in ("megadpo", "log_softmax + gather") for backward in (False, True)]
    print_table(
        f"Extra peak memory in MiB of a log-prob step over the head, vocabulary {report['vocabulary']:,}, hidden "
        f"{report['hidden']}, fp32, every token scored",
        ["tokens", "hidden states", *(f"{way}, {'forward + backward' if b else 'forward'}" for way, b in ways)],
        [
            [n, 4 * n * report["hidden"] / MIB, *(extra(n, way, backward) for way, backward in ways)]
            for n in dict.fromkeys(p["tokens"] for p in points)
        ],
    )
    for half in (report["half_scored"], report["half_scored_forward"]):
        print_table(
            f"Head, {'forward + backward' if half['backward'] else 'forward only'}, {half['kernels_used']}; "
            f"{half['tokens']:,} tokens of which half are scored, hidden {half['hidden']:,}, vocabulary "
            f"{half['vocabulary']:,}, fp32; the time ratio is the median over interleaved rounds",
            ["way", "seconds", "extra MiB"],
            [
                *([way, seconds, half["extra_mib"][way]] for way, seconds in half["median_seconds"].items()),
                ["ratio", half["time_ratio"], half["memory_ratio"]],
            ],
        )
