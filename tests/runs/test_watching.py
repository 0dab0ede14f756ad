"""What a run says of itself while it trains: seconds by part, the slowest rank, MFU, time, a profile; in every schedule and
engine."""

from __future__ import annotations

import gzip
import json
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from megadpo.platform.step_clock import PARTS
from tests.helpers.runs import run_settings, save_files, train_each
from tests.helpers.worlds import run_world

PIPELINE = {"pipeline": 2}
RUNS: dict[str, dict[str, Any]] = {
    "data": {"logging": {"peak_tflops": 0.01, "profile_steps": [2, 3], "profile_ranks": [1]}},
    "pipeline": {"parallel": PIPELINE},
    "own-schedule": {"parallel": PIPELINE, "schedule": {"name": "1f1b", "reference": "interleaved"}},
    "deepspeed": {"parallel": {"engine": "deepspeed", "zero_stage": 2}},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs of two processes."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is an extra of its own")
    made = tmp_path_factory.mktemp("watching")
    files = save_files(made, "llama", 40)
    few = {"train": {"steps": 4, "pairs_per_step": 4, "tokens_per_micro_batch": 256}}
    run_world(2, train_each, [run_settings(files, made / name, **few, **changes) for name, changes in RUNS.items()])
    return made


def records_of(directory: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_the_parts_of_a_step_add_up_to_it(directory: Path, name: str) -> None:
    records = records_of(directory, name)
    shares = [sum(record[f"seconds/{part}"] for part in PARTS) / record["step_seconds"] for record in records]
    assert len(shares) == 4 and 0.9 < statistics.median(shares) <= 1
    for part in PARTS:
        assert all(record[f"seconds/{part}"] >= 0 for record in records)
        assert part == "data" or max(record[f"seconds/{part}"] for record in records) > 0, part
    # The model's own work is the larger part of it, forward and backward both.
    busy = [record["seconds/forward"] + record["seconds/backward"] + record["seconds/reference"] for record in records]
    assert all(record["seconds/backward"] > 0 and record["seconds/forward"] > 0 for record in records) and min(busy) > 0


@pytest.mark.parametrize("name", RUNS)
def test_each_record_has_its_time_and_from_the_second_on_the_slowest_rank(directory: Path, name: str) -> None:
    records = records_of(directory, name)
    times = [record["time"] for record in records]
    assert times == sorted(times) and time.time() - 3600 < times[0] and times[-1] <= time.time()
    assert "slowest_rank" not in records[0]
    assert all(record["slowest_rank"] in (0, 1) and record["slowest_rank_ratio"] >= 1 for record in records[1:])


def test_mfu_is_useful_work_over_time_and_the_peak_of_all_devices_and_left_out_where_that_is_not_known(
    directory: Path,
) -> None:
    records = records_of(directory, "data")
    flop = [record["mfu"] * record["step_seconds"] * 2 * 0.01e12 for record in records]
    # Answers and prompts alike meet every parameter: what a step costs follows from its tokens, nearly.
    tokens = [
        b - a for a, b in zip([0, *(r["num_tokens"] for r in records)], [r["num_tokens"] for r in records], strict=False)
    ]
    each = [work / num for work, num in zip(flop, tokens, strict=True)]
    assert max(each) < 1.5 * min(each) and min(each) > 0
    assert all("mfu" not in record for name in ("pipeline", "deepspeed") for record in records_of(directory, name))


def test_a_window_of_steps_is_profiled_on_the_ranks_that_were_named(directory: Path) -> None:
    (trace,) = (directory / "data" / "profile").iterdir()
    assert trace.name == "rank_00001_steps_2_to_3.json.gz"
    names = {event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert any("aten::mm" in name or "aten::addmm" in name for name in names)
    assert not (directory / "pipeline" / "profile").exists()
