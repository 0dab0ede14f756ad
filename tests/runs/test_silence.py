"""No silence of more than two seconds before the first step, as a reader of the log has it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.helpers.models import save_model, write_hh

ROOT = Path(__file__).parents[2]
LIMIT = 2.0
"""Seconds."""


class Stalls:
    """How much later than it asked this machine wakes a thread that sleeps: what no program can do anything about."""

    def __init__(self) -> None:
        self.worst = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._measure)

    def __enter__(self) -> Stalls:
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._done.set()
        self._thread.join()

    def _measure(self) -> None:
        while not self._done.is_set():
            before = time.monotonic()
            time.sleep(0.05)
            self.worst = max(self.worst, time.monotonic() - before - 0.05)


def say_when(command: list[str], **environment: str) -> tuple[int, list[tuple[float, str]]]:
    """Exit status, and every line of stderr with the seconds from the start to it."""
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    began = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**clean, **environment}, cwd=ROOT)
    assert process.stderr is not None
    lines = [(time.monotonic() - began, line.rstrip("\n")) for line in process.stderr]
    return process.wait(), lines


def silences_before_step_1(lines: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Seconds without a line, each with the line that ended them, up to the first step's."""
    last = next(number for number, (_, line) in enumerate(lines) if line.startswith("step 1/"))
    times = [0.0, *(when for when, _ in lines[: last + 1])]
    return [(b - a, line) for a, b, (_, line) in zip(times, times[1:], lines, strict=False)]


def train(tmp_path: Path, num_rows: int, *settings: str) -> tuple[list[tuple[float, str]], float]:
    """A run from nothing, its token cache included: what it said when, and the machine's worst stall meanwhile."""
    save_model(tmp_path / "model", "llama")
    rows = write_hh(tmp_path / "few.jsonl", 250).read_text().splitlines(keepends=True)
    with (tmp_path / "train.jsonl").open("w") as file:
        for number in range(num_rows):
            file.write(rows[number % len(rows)])
    made = [
        "model.dtype=fp32",
        "data.max_length=128",
        "train.steps=2",
        "train.pairs_per_step=4",
        "logging.tensorboard=false",
    ]
    made += [f"model.path={tmp_path / 'model'}", f"data.train={tmp_path / 'train.jsonl'}", f"output_dir={tmp_path / 'out'}"]
    (tmp_path / "run.yaml").write_text("{}")
    command = [sys.executable, "-m", "megadpo", "train", str(tmp_path / "run.yaml"), *made, *settings]
    with Stalls() as stalls:
        status, lines = say_when(command, MEGADPO_CACHE=str(tmp_path / "cache"))
    assert status == 0, lines
    return lines, stalls.worst


def check(lines: list[tuple[float, str]], worst_stall: float) -> None:
    longest = max(silences_before_step_1(lines))
    print(f"longest silence {longest[0]:.2f} s, before {longest[1]!r}; the machine's worst stall {worst_stall:.2f} s")
    assert longest[0] <= LIMIT + 3 * worst_stall, lines
    assert lines[0][0] <= 1 + 3 * worst_stall + 0.5, lines[0]


@pytest.mark.slow
@pytest.mark.alone
def test_no_silence_is_long_before_the_first_step(tmp_path: Path) -> None:
    lines, worst_stall = train(tmp_path, 300, "reference.mode=precomputed")
    check(lines, worst_stall)
    said = "\n".join(line for _, line in lines)
    assert lines[0][1] == f"megadpo: training {tmp_path / 'model'} on {tmp_path / 'train.jsonl'}, into {tmp_path / 'out'}"
    assert "megadpo: loading torch" in said and "rows" in said


@pytest.mark.exhaustive
@pytest.mark.alone
@pytest.mark.timeout(1800)
def test_no_silence_is_long_before_the_first_step_of_a_run_on_30_000_rows(tmp_path: Path) -> None:
    lines, worst_stall = train(tmp_path, 30_000, "data.num_workers=2", "reference.mode=precomputed")
    check(lines, worst_stall)
    assert any("tokenising: " in line and "of 30,000 rows" in line for _, line in lines), lines
    assert any("computing the reference's log-probs: " in line for _, line in lines), lines
