"""The way of a new user, on hh-rlhf rows: look at the data, plan, train, read the report, judge the model; timed."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.launched import finish_command
from tests.helpers.models import save_model, write_hh

WAY = {
    "inspect": "inspect run.yaml",
    "plan": "plan run.yaml --devices 2 --memory 8GiB",
    "train": "train run.yaml",
    "report": "report runs/first",
    "eval": "eval runs/first --generate 2 --max-new-tokens 16",
}
CONFIG = """
model: {path: MODEL_DIR}
data: {train: pairs.jsonl, eval: held_out.jsonl, max_length: 256, cache_dir: cache}
train: {epochs: 1, pairs_per_step: 8, tokens_per_micro_batch: 2048, learning_rate: 1.0e-4}
output_dir: runs/first
"""
MOST_SECONDS = 300
"""On the slowest machine that anybody has; the table that is printed has what it took."""

pytestmark = [
    pytest.mark.slow,
]


@dataclass(frozen=True)
class Done:
    status: int
    output: str
    seconds: float


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("new-user")
    save_model(directory / "MODEL_DIR", num_hidden_layers=2)
    lines = write_hh(directory / "pairs.jsonl", 56).read_text().splitlines(keepends=True)
    (directory / "held_out.jsonl").write_text("".join(lines[40:]))
    (directory / "pairs.jsonl").write_text("".join(lines[:40]))
    (directory / "run.yaml").write_text(CONFIG)
    return directory


@pytest.fixture(scope="module")
def way(workplace: Path) -> dict[str, Done]:
    """Every command, one after the other, as far as they go."""
    done: dict[str, Done] = {}
    for name, command in WAY.items():
        start = time.monotonic()
        status, output = finish_command(command.split(), workplace)
        done[name] = Done(status, output, time.monotonic() - start)
        if status:
            break
    return done


def test_each_command_of_the_way_works_after_the_one_before_it(way: dict[str, Done]) -> None:
    for name, one in way.items():
        print(f"{name:8s} {one.seconds:6.1f} s")
    assert {name: one.status for name, one in way.items()} == dict.fromkeys(WAY, 0), list(way.values())[-1].output
    assert sum(one.seconds for one in way.values()) < MOST_SECONDS


def test_each_command_shows_what_the_user_wants_to_know_next(way: dict[str, Done]) -> None:
    assert "40" in way["inspect"].output and "pairs.jsonl" in way["inspect"].output
    assert "GiB" in way["plan"].output
    assert "rewards/accuracies" in way["train"].output or "loss" in way["train"].output
    assert "report.html" in way["report"].output
    assert "Reward accuracy by log_ratio" in way["eval"].output and "held_out" in way["eval"].output


def test_the_way_leaves_a_model_a_report_and_its_evaluation(workplace: Path, way: dict[str, Done]) -> None:
    run = workplace / "runs" / "first"
    assert (run / "hf" / "model.safetensors").is_file() and (run / "report.html").is_file()
    evaluation = json.loads((run / "eval" / "eval.json").read_text())
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert evaluation["all"]["accuracy"] == steps[-1]["eval_rewards/accuracies"]
    assert len(evaluation["generations"]) == 2
