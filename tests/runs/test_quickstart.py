"""The quickstart does what the README promises: it trains, and the outcome is better than what it began with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.helpers.launched import finish_script

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "run.py"


def quickstart(directory: Path, *arguments: str) -> tuple[int, str]:
    return finish_script(QUICKSTART, ["--output", str(directory / "run"), *arguments], directory)


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_the_trained_model_prefers_and_gives_right_answers(tmp_path: Path) -> None:
    status, output = quickstart(tmp_path)
    assert status == 0, output
    check(tmp_path / "run", output, num_steps=80, num_held_out=512, least_accuracy=0.9)
    right = re.search(r"right answers: ([\d.]+)% before DPO, ([\d.]+)% after", output)
    assert right and float(right[2]) > float(right[1]) + 5, right


@pytest.mark.slow
def test_with_fewer_steps_it_goes_the_same_way_and_prefers_right_answers_too(tmp_path: Path) -> None:
    sizes = {"--train-pairs": 1000, "--held-out-pairs": 128, "--warm-up-steps": 20, "--steps": 20}
    status, output = quickstart(tmp_path, *(str(word) for size in sizes.items() for word in size))
    assert status == 0, output
    check(tmp_path / "run", output, num_steps=20, num_held_out=128, least_accuracy=0.6)
    assert re.search(r"right answers: [\d.]+% before DPO, [\d.]+% after", output)


def check(run: Path, output: str, num_steps: int, num_held_out: int, least_accuracy: float) -> None:
    """What it says at its end, and the pairs and metrics that it leaves."""
    last = output.rstrip().splitlines()[-1]
    match = re.fullmatch(r"held-out reward accuracy: (\d\.\d\d)", last)
    assert match and float(match[1]) > least_accuracy, last
    assert "margin before the first update (training pairs): 0.0\n" in output
    metrics = (run / "dpo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in metrics] == list(range(1, num_steps + 1))
    rows = {
        name: {json.loads(line)["prompt"] for line in (run / name).read_text(encoding="utf-8").splitlines()}
        for name in ("train.jsonl", "held_out.jsonl")
    }
    assert len(rows["held_out.jsonl"]) == num_held_out and not rows["train.jsonl"] & rows["held_out.jsonl"]


@pytest.mark.slow
def test_an_earlier_quickstart_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "run" / "dpo").mkdir(parents=True)
    status, output = quickstart(tmp_path)
    assert status == 2
    assert "holds a quickstart already" in output and "Traceback" not in output
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["dpo"]
