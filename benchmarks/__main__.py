"""``python -m benchmarks NAME [options]`` runs a benchmark; ``--list`` says in a line each which there are.

A benchmark is a module of this folder, named in BENCHMARKS, whose docstring says in its first line what it measures, with
`add_arguments(parser)` for what can be set, and `run(options, report)`, which prints tables and puts every figure in
the report. Whatever they have in common is done here: an equal start, the machine's name, the number of threads, --json.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import equal_start, machine, write_json

BENCHMARKS = (
    "against_trl",
    "epoch_against_trl",
    "memory_against_trl",
    "adapters",
    "sharing",
    "head_memory",
    "attention",
    "experts",
    "data",
    "memory",
    "long_context",
    "context_memory",
    "zero_memory",
    "schedules",
    "simulated",
    "scaling",
    "coupled",
    "precision",
    "gpu",
    "predict",
    "checkpoints",
    "conversion",
)
OWN_ALLOCATOR = ("memory_against_trl", "zero_memory", "simulated", "predict", "conversion")
"""These run under malloc's own settings: they measure memory in this process or its children, or nothing of the kind. So do
the children in which "adapters" measures it (--arm)."""


def main(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("--list", "-h", "--help"):
        print(f"{__doc__.partition(chr(10))[0]}\n")
        for name in BENCHMARKS:
            print(f"{name:20}{summary(name)}")
        return
    name, *rest = arguments
    if name not in BENCHMARKS:
        raise SystemExit(f"no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    module = importlib.import_module(f"benchmarks.{name}")
    options = parser_of(name, module).parse_args(rest)
    if name not in OWN_ALLOCATOR and getattr(options, "arm", None) is None:
        equal_start(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks", *arguments]),
        "machine": machine(options.threads),
    }
    is_first = os.environ.get("RANK", "0") == "0"  # torchrun starts some of them
    if is_first:
        print(report["machine"])
    module.run(options, report)
    if is_first:
        write_json(options.json, report)


def parser_of(name: str, module: Any) -> argparse.ArgumentParser:
    """What all benchmarks take, and what this one adds."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", metavar="FILE", help="write every figure there")
    parser.add_argument("--threads", type=int, default=2, help="of each process (default: %(default)s)")
    module.add_arguments(parser)
    return parser


def summary(name: str) -> str:
    """The first line of a benchmark's docstring, read without importing it."""
    text = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


if __name__ == "__main__":
    main(sys.argv[1:])
