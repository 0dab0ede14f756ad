"""Measures the memory of small runs and sets it beside what `megadpo plan` reckons, in docs/plan.md, in a few minutes:
``python -m tools.plan_table --write`` (a test measures some of them again, and all with --exhaustive)."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from megadpo.planning.memory import RankMemory
from tests.helpers.tensor_bytes import Held
from tests.unit.planning.measured import CASES, Case, measured, reckoned, save_files
from tools.generated import Part

PART = Part(
    Path(__file__).parents[1] / "docs" / "plan.md",
    "<!-- Between these marks: made by tools/plan_table.py from runs. -->\n",
    "<!-- end of the table -->\n",
)
COLUMNS = ("processes", "model", "options", "rank", "between steps", "reckoned", "peak", "reckoned", "reckoned / measured")


def render() -> str:
    """A line for the fullest rank of each case."""
    with tempfile.TemporaryDirectory() as directory:
        files = save_files(Path(directory))
        lines = [line(case, held, reckoned(case, files)) for case, held in zip(CASES, measured(CASES, files), strict=True)]
    rule = " | ".join("---" for _ in COLUMNS)
    return "\n".join(["| " + " | ".join(COLUMNS) + " |", f"| {rule} |", *lines]) + "\n"


def line(case: Case, held: Sequence[Held], memories: Sequence[RankMemory]) -> str:
    """Of the rank that held most."""
    rank = max(range(len(held)), key=lambda rank: held[rank].peak)
    of_rank, memory = held[rank], memories[rank]
    between, peak = sum(memory.between.values()), memory.peak
    options = ", ".join(f"`{name}: {str(value).lower()}`" for name, value in case.options.items())
    sizes = [of_rank.between, between, of_rank.peak, peak]
    cells = [str(case.num_processes), case.family, options, str(rank), *(f"{size / 2**20:.1f}" for size in sizes)]
    return "| " + " | ".join([*cells, f"{peak / of_rank.peak:.2f}"]) + " |"


if __name__ == "__main__":
    PART.main(render)
