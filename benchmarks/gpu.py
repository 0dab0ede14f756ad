"""Seconds, MFU, memory and kernels of a step on a CUDA device against TRL's DPOTrainer, by models, lengths and options.

A Qwen3 of random weights in bf16 with a live reference on pairs of random tokens. Every arm is a process of its own, that
trains on each mix of lengths; ours come first and, where time is left, again after TRL's. The first steps, which compile,
are not counted. One more step is profiled: milliseconds of its kernels by what they do. Arms that begin with "trl" are
TRL's DPOTrainer on the same pairs, sorted by length within a step, with bf16 weights and the micro-batch and options that
they name; "trl" alone stands for all of TRL_ARMS. MFU is useful FLOP (benchmarks/flop.py) over 989 TFLOP/s, the H100's for
dense bf16. All ends within --seconds, with what there is by then.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import add_shared, print_table, write_json

SIZES = ("1.7B", "0.6B")
LENGTHS = ("UltraFeedback-like", "hh-rlhf-like", "prompt-heavy")

CHECKPOINTED, LIGER, UNPADDED = "gradient_checkpointing", "use_liger_kernel", "padding_free"
TRL_ARMS = [
    # Those that promise most come first: Liger's kernels, a micro-batch that fills the device, checkpointing to fit it.
    "+".join(["trl", str(size), *switched_on])
    for switched_on in (
        (CHECKPOINTED, LIGER),
        (LIGER,),
        (CHECKPOINTED,),
        (),
        (CHECKPOINTED, LIGER, UNPADDED),
        (LIGER, UNPADDED),
        (CHECKPOINTED, UNPADDED),
        (UNPADDED,),
    )
    for size in ((16, 32, 8, 4, 2, 1) if CHECKPOINTED in switched_on else (4, 8, 2, 16, 1))
]
SPARE_SECONDS = 6.0
"""For ending a process and writing what there is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, rounds=4, warm_up=2, pairs=64, vocabulary=151_936, layers=28, capacity=16_384, tiny=False)
    parser.add_argument("--seconds", type=float, default=1800, help="for all of it, at most (default: %(default)s)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES], help="of the model")
    parser.add_argument("--mixes", nargs="+", choices=LENGTHS, default=[*LENGTHS], help="lengths of pairs")
    parser.add_argument("--longest", type=int, default=2048, help="tokens of a prompt with an answer, UltraFeedback-like")
    parser.add_argument("--trl-rounds", type=int, default=1, help="measured steps of TRL's arms (default: %(default)s)")
    parser.add_argument("--turns", type=int, choices=(1, 2), default=2, help="of ours: before TRL's, or after them as well")
    parser.add_argument("--svg", metavar="FILE", help="draw the kernels of our steps by kind")
    parser.add_argument(
        "--arms",
        nargs="+",
        default=["auto+auto", "trl"],
        metavar="ATTENTION+SMALL_OPS[+OPTION=VALUE…]",
        help="values of model.attention and model.small_ops, and further options, such as train.recompute=full; or "
        "trl+PAIRS[+OPTION…], TRL's micro-batch and what is set of gradient_checkpointing, use_liger_kernel and "
        "padding_free; or trl, for all of these (default: %(default)s)",
    )


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    import torch

    if not torch.cuda.is_available() and not options.tiny:
        raise SystemExit("benchmarks gpu needs a CUDA device, of which there is none")
    ends = time.monotonic() + options.seconds - SPARE_SECONDS
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        try:
            for arm, size, mixes, limit in turns(options, records, ends):
                records += _in_own_process(arm, size, mixes, options, Path(directory), limit)
                report["arms"] = joined(records)
                write_json(options.json, report)
        except KeyboardInterrupt:
            print("interrupted: what there is by now", flush=True)
    report["arms"] = joined(records)
    _print(report["arms"], options)
    if options.svg:
        draw(Path(options.svg), report["arms"])


def turns(
    options: argparse.Namespace, records: Sequence[dict[str, Any]], ends: float
) -> Iterator[tuple[str, str, list[str], float]]:
    """Arm, size, mixes and the seconds left to it, while there are any: ours, TRL's by what they promise, ours again.

    Args:
        records: of the turns so far, which the caller adds to; what ran out of memory is not tried with more pairs.
        ends: when all is over, by time.monotonic().
    """
    ours = [arm for arm in options.arms if not arm.startswith("trl")]
    named = [arm for arm in options.arms if arm.startswith("trl+")]
    trls = [*named, *(arm for arm in TRL_ARMS if "trl" in options.arms and arm not in named)]
    first_turns: dict[tuple[str, str], float] = {}
    for arm in ours:
        for size in options.sizes:
            started = time.monotonic()
            if started < ends:
                yield arm, size, options.mixes, ends - started
            first_turns[arm, size] = time.monotonic() - started
    has_again = bool(trls) and options.turns == 2
    again = 1.1 * sum(first_turns.values()) + SPARE_SECONDS if has_again else 0.0
    for arm in trls:
        missing = _missing(arm)
        if missing:
            print(f"{arm}: {missing}", flush=True)
            continue
        for size in options.sizes:
            mixes = [mix for mix in options.mixes if not _is_too_large(arm, size, mix, records)]
            left = ends - again - time.monotonic()
            if mixes and left > 0:
                yield arm, size, mixes, left
    for (arm, size), took in first_turns.items() if has_again else ():
        left = ends - time.monotonic()
        if left > took:
            yield arm, size, options.mixes, left


def _missing(arm: str) -> str | None:
    """Why an arm of TRL's cannot be had here."""
    switched_on = arm.split("+")[2:]
    if LIGER in switched_on and importlib.util.find_spec("liger_kernel") is None:
        return "left out, Liger is not installed"
    if UNPADDED not in switched_on:
        return None
    if importlib.util.find_spec("flash_attn") is None:
        return "left out, flash-attn is not installed"
    source = importlib.util.find_spec("trl.trainer.dpo_trainer")
    text = Path(str(source.origin)).read_text(encoding="utf-8") if source else ""
    return "left out, this version of TRL has it switched off" if "`padding_free=True` is temporarily" in text else None


def _is_too_large(arm: str, size: str, mix: str, records: Sequence[dict[str, Any]]) -> bool:
    """Whether as many pairs or fewer, with what saves as much memory or more, ran out of memory."""
    pairs, switched_on = _micro_batch(arm)
    for record in records:
        if (record["size"], record["mix"], record.get("failed")) != (size, mix, "out of memory"):
            continue
        if record["arm"].startswith("trl+"):
            fewer, with_more = _micro_batch(record["arm"])
            if fewer <= pairs and with_more >= switched_on:
                return True
    return False


def _micro_batch(arm: str) -> tuple[int, set[str]]:
    _, pairs, *switched_on = arm.split("+")
    return int(pairs), set(switched_on)


def _in_own_process(
    arm: str, size: str, mixes: list[str], options: argparse.Namespace, directory: Path, seconds: float
) -> list[dict[str, Any]]:
    """The records of an arm on every mix; what has none after so many seconds has not ended."""
    out = directory / "records.jsonl"
    out.unlink(missing_ok=True)
    names = ("pairs", "rounds", "trl_rounds", "warm_up", "capacity", "longest", "layers", "vocabulary", "tiny", "threads")
    point = {"arm": arm, "size": size, "mixes": mixes, "model": str(directory / size / "model"), "out": str(out)}
    point |= {name: getattr(options, name) for name in names}
    started = time.monotonic()
    child = subprocess.Popen([sys.executable, "-m", "benchmarks.gpu_point", json.dumps(point)], start_new_session=True)
    try:
        status = child.wait(seconds)
        why = f"ended with status {status}, see what it printed"
    except subprocess.TimeoutExpired:
        why = "not ended when the time was over"
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    records = [json.loads(line) for line in lines]
    done = {record["mix"] for record in records}
    records += [{"arm": arm, "size": size, "mix": mix, "failed": why} for mix in mixes if mix not in done]
    print(f"{arm}, {size}: {time.monotonic() - started:.0f} s in all", flush=True)
    for record in records:
        print(f"  {record['mix']}: {_in_short(record)}", flush=True)
    return records


def joined(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record for each arm, size and mix: the first turn's, with the seconds of all turns and the median of the medians.

    A turn that failed counts where no other came to its end.
    """
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault((record["size"], record["mix"], record["arm"]), []).append(record)
    result = []
    for turns_of_it in found.values():
        good = [record for record in turns_of_it if "failed" not in record]
        if not good:
            result.append(turns_of_it[0])
            continue
        fields = ("median_seconds", "pairs_per_second", "tokens_per_second", "mfu")
        means = {name: sum(record[name] for record in good) / len(good) for name in fields}
        seconds = [each for record in good for each in record["seconds"]]
        result.append(good[0] | means | {"seconds": seconds, "turns": len(good)})
    return result


def best_of(arms: Sequence[dict[str, Any]], size: str, mix: str, is_trl: bool) -> dict[str, Any] | None:
    """The arm with the most pairs a second, of TRL's or of ours, where one came to its end."""
    able = [
        arm
        for arm in arms
        if (arm["size"], arm["mix"], arm["arm"].startswith("trl")) == (size, mix, is_trl) and "failed" not in arm
    ]
    return max(able, key=lambda arm: arm["pairs_per_second"], default=None)


def _in_short(record: dict[str, Any]) -> str:
    if "failed" in record:
        return record["failed"]
    return f"{record['median_seconds']:.3f} s a step, MFU {record['mfu']:.3f}, {record['peak_gib']:.1f} GiB"


def _print(arms: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    kinds = [kind for kind, _ in _kernels_of(arms).most_common()]
    for size in options.sizes:
        for mix in options.mixes:
            rows = [_row(arm, kinds) for arm in arms if (arm["size"], arm["mix"]) == (size, mix)]
            title = f"Steps of {options.pairs} pairs, {mix}, {size}, {options.capacity:,} tokens a micro-batch of ours"
            columns = ["arm", "s / step", "pairs / s", "tokens / s", "MFU", "peak GiB", "first step, s"]
            print_table(title, [*columns, *(f"{kind}, ms" for kind in kinds)], rows)
            ours, theirs = (best_of(arms, size, mix, is_trl) for is_trl in (False, True))
            if ours and theirs:
                ratio = ours["pairs_per_second"] / theirs["pairs_per_second"]
                print(f"\n{ours['arm']} has {ratio:.2f} times the pairs / s of TRL's best, {theirs['arm']}.", flush=True)


def _row(arm: dict[str, Any], kinds: Sequence[str]) -> list[str]:
    if "failed" in arm:
        return [arm["arm"], arm["failed"], *[""] * (5 + len(kinds))]
    return [
        arm["arm"],
        f"{arm['median_seconds']:.3f}",
        f"{arm['pairs_per_second']:.1f}",
        f"{arm['tokens_per_second']:,.0f}",
        f"{arm['mfu']:.3f}",
        f"{arm['peak_gib']:.1f}",
        f"{arm['first_seconds']:.1f}",
        *(f"{arm['kernel_ms'][kind]:.0f}" if kind in arm["kernel_ms"] else "" for kind in kinds),
    ]


def _kernels_of(arms: Sequence[dict[str, Any]]) -> Counter[str]:
    """Milliseconds of kernels over all arms, by kind."""
    total: Counter[str] = Counter()
    for arm in arms:
        total.update(arm.get("kernel_ms", {}))
    return total


def draw(path: Path, arms: Sequence[dict[str, Any]]) -> None:
    """A bar for every step that was profiled: its kernels by kind, and what of the step's time they are not."""
    from benchmarks.plot import stacked_bars

    profiled = [arm for arm in arms if arm.get("kernel_ms")]
    kinds = [kind for kind, _ in _kernels_of(profiled).most_common()]
    bars = {}
    for arm in profiled:
        parts = {kind: arm["kernel_ms"][kind] for kind in kinds if kind in arm["kernel_ms"]}
        rest = max(0.0, 1000 * arm["median_seconds"] - sum(parts.values()))
        bars[f"{arm['size']}, {arm['mix']}, {arm['arm']}"] = {**parts, "no kernel": rest}
    stacked_bars(path, "A step by what its kernels do", "ms", bars)
