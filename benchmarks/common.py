"""What the benchmarks share: an equal start for every arm, interleaved timing, tables, JSON and the machine's name."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
"""Large blocks stay with the process: glibc otherwise maps and clears fresh pages for every activation, which costs the
arm with the larger tensors most."""


def equal_start(num_threads: int) -> None:
    """Start this command again with the malloc and thread settings of all arms; call it before torch is imported."""
    wanted = {**MALLOC, "OMP_NUM_THREADS": str(num_threads), "TOKENIZERS_PARALLELISM": "false"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.environ.update(wanted)
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ)


MIXES = ["hh-rlhf", "prompt-heavy", "UltraFeedback-like"]
"""Lengths of pairs: real rows, and two synthetic mixes."""
SHARED: dict[str, dict[str, Any]] = {
    "rounds": {"type": int, "help": "measured rounds of each arm"},
    "warm_up": {"type": int, "help": "rounds of each arm before that"},
    "pairs": {"type": int, "help": "pairs a step"},
    "capacity": {"type": int, "help": "tokens a micro-batch of megadpo's"},
    "mixes": {"nargs": "+", "choices": MIXES, "help": "lengths of pairs"},
    "vocabulary": {"type": int, "help": "of the model"},
    "hidden": {"type": int, "help": "of the model"},
    "layers": {"type": int, "help": "of the model"},
    "heads": {"type": int, "help": "of the model"},
    "tiny": {"action": "store_true", "help": "a toy model and short pairs, to see whether the tool works"},
}
"""Options that several benchmarks have."""


def add_shared(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add some of the shared options, by name, each with its default in this benchmark."""
    for name, default in defaults.items():
        parser.add_argument("--" + name.replace("_", "-"), default=default, **SHARED[name])


def machine(num_threads: int | None = None) -> dict[str, Any]:
    """Where and when: processor, cores, memory, library versions, load average; threads are torch's unless given."""
    import torch

    return {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "torch": torch.__version__,
        "threads": num_threads or torch.get_num_threads(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return os.uname().machine
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), os.uname().machine)


def interleaved(arms: Mapping[str, Callable[[int], Any]], num_rounds: int, num_warm_up: int) -> dict[str, list[float]]:
    """Seconds of every arm in every round, the arms taking turns (A B A B …) so that a busy moment hits both.

    Args:
        arms: each called with the number of the round; warm-up rounds come first, are numbered -1, -2, …, and not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in [*range(-num_warm_up, 0), *range(num_rounds)]:
        for name, arm in arms.items():
            started = time.perf_counter()
            arm(number)
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A Markdown table; floats with three significant digits."""
    print(f"\n{title}\n")
    for cells in [columns, ["---"] * len(columns), *rows]:
        print("| " + " | ".join(_cell(cell) for cell in cells) + " |")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_json(path: str | None, report: Mapping[str, Any]) -> None:
    """Write the report where `--json` says."""
    if path is not None:
        Path(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
