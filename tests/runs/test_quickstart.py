"""The quickstart does what the README promises: it trains, and the outcome is better than what it began with."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "run.py"


def quickstart(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(QUICKSTART), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=580)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_trained_model_prefers_and_gives_right_answers(tmp_path: Path) -> None:
    done = quickstart("--output", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.rstrip().splitlines()
    match = re.fullmatch(r"held-out reward accuracy: (\d\.\d\d)", lines[-1])
    assert match and float(match[1]) > 0.9, lines[-1]
    right = re.search(r"right answers: ([\d.]+)% before DPO, ([\d.]+)% after", done.stdout)
    assert right and float(right[2]) > float(right[1]) + 5, right
    assert "margin before the first update (training pairs): 0.0\n" in done.stdout
    metrics = (tmp_path / "run" / "dpo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in metrics] == list(range(1, 81))
    rows = {
        name: {json.loads(line)["prompt"] for line in (tmp_path / "run" / name).read_text(encoding="utf-8").splitlines()}
        for name in ("train.jsonl", "held_out.jsonl")
    }
    assert len(rows["held_out.jsonl"]) == 512 and not rows["train.jsonl"] & rows["held_out.jsonl"]


@pytest.mark.slow
def test_an_earlier_quickstart_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "dpo").mkdir()
    done = quickstart("--output", tmp_path)
    assert done.returncode == 2
    assert "holds a quickstart already" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["dpo"]
