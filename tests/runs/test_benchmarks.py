"""The benchmarks run and report what they promise; at these sizes their times mean nothing."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.worlds import run_world

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def _report(tool: str, directory: Path, *options: str) -> dict:
    """What the command `python -m benchmarks` reports."""
    path = directory / f"{tool}.json"
    command = [sys.executable, "-m", "benchmarks", tool, "--threads", "1", "--json", str(path), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return _read(tool, path, done.stdout)


def _forked_report(tool: str, directory: Path, *options: str) -> dict:
    """The same in a process that has imported what it needs already: for benchmarks that weigh nothing in it."""
    path = directory / f"{tool}.json"
    (printed,) = run_world(1, benchmark, [tool, "--threads", "1", "--json", str(path), *options])
    return _read(tool, path, printed)


def benchmark(arguments: list[str]) -> str:
    """What a benchmark prints; in a process of its own, as if no launcher had started it."""
    from benchmarks import __main__ as front
    from benchmarks.common import MALLOC

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    os.environ.update(MALLOC, OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")  # else it starts itself again with them
    os.chdir(ROOT)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        front.main(arguments)
    return printed.getvalue()


def _read(tool: str, path: Path, printed: str) -> dict:
    assert "| --- |" in printed, "a table is printed"
    report = json.loads(path.read_text())
    assert report["command"].startswith(f"python -m benchmarks {tool} ")
    assert report["machine"]["threads"] == 1
    return report


def test_the_list_has_every_benchmark_and_a_line_on_each():
    from benchmarks.__main__ import BENCHMARKS, summary

    files = (ROOT / "benchmarks").glob("*.py")
    assert {file.stem for file in files if "def add_arguments(" in file.read_text(encoding="utf-8")} == set(BENCHMARKS)
    listed = subprocess.run([sys.executable, "-m", "benchmarks", "--list"], cwd=ROOT, capture_output=True, text=True).stdout
    assert all(f"{name:20}{summary(name)}" in listed and len(summary(name)) > 20 for name in BENCHMARKS)


def test_a_benchmark_that_is_none_is_named_with_those_that_are():
    done = subprocess.run([sys.executable, "-m", "benchmarks", "speed"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "no benchmark 'speed'; there are against_trl, " in done.stderr


def test_sharing_prompts_saves_tokens_and_the_report_has_tokens_times_and_bound(tmp_path):
    sizes = ("--rounds", "2", "--warm-up", "1", "--pairs", "4", "--vocabulary", "2000")
    report = _forked_report("sharing", tmp_path, "--tiny", *sizes)
    tokens = report["tokens"]
    assert tokens["pairs"] == report["rows"]["num_kept"] > 500
    assert 0.5 < tokens["ratio"] < 1
    assert math.isclose(tokens["per_pair_shared"], tokens["ratio"] * tokens["per_pair_unshared"])
    assert [times["reference"] for times in report["times"]] == ["resident", "none"]
    for times in report["times"]:
        assert times["tokens"]["pairs"] == 8, "the time is of these pairs"
        assert all(len(seconds) == 2 for seconds in times["seconds"].values())
        assert times["time_ratio"] > 0 and times["gain_to_bound"] > 0
        assert math.isclose(times["bound"], 1 / times["tokens"]["ratio"])


def test_head_memory_stays_while_the_plain_way_grows(tmp_path):
    few, many, vocabulary = 512, 4096, 16384
    half = ("--half-tokens", "64", "--half-hidden", "16", "--half-vocabulary", "2000", "--rounds", "1")
    sizes = ("--tokens", str(few), str(many), "--vocabulary", str(vocabulary), "--hidden", "16", "--tile-mib", "32")
    report = _report("head_memory", tmp_path, *sizes, *half)
    extra = {(p["way"], p["backward"], p["tokens"]): p["extra_mib"] for p in report["memory"]}
    logits_mib = 4 * (many - few) * vocabulary / 2**20
    for backward in (False, True):
        grown = {way: extra[way, backward, many] - extra[way, backward, few] for way, *_ in extra}
        assert grown["log_softmax + gather"] > 0.9 * logits_mib
        assert grown["megadpo"] < 0.1 * logits_mib
    for half in (report["half_scored"], report["half_scored_forward"]):
        assert half["time_ratio"] > 0 and half["memory_ratio"] > 0


@pytest.mark.exhaustive
def test_two_context_ranks_keep_half_of_the_activations_by_both_methods(tmp_path):
    sizes = ("--tokens", "4096", "--prompt", "256", "--response", "128", "--hidden", "64", "--layers", "2")
    report = _report("context_memory", tmp_path, *sizes, "--heads", "4", "--key-value-heads", "4")
    one, *several = report["points"]
    assert [point["method"] for point in several] == ["ulysses", "allgather"]
    for point in several:
        assert 0.4 < point["kept_mib"] / one["kept_mib"] < 0.55
        assert point["peak_mib"] < one["peak_mib"]
        assert point["pairs_over_mean"] < 1.05


@pytest.mark.exhaustive
@pytest.mark.alone
def test_stages_are_less_idle_with_the_reference_in_the_bubbles(tmp_path):
    sizes = ("--micro-batches", "4", "--steps", "3", "--rounds", "1", "--hidden", "64", "--layers", "2", "--tokens", "64")
    seconds = ("--forward", "0.005", "--backward", "0.01", "--reference", "0.005")
    report = _report("schedules", tmp_path, *sizes, *seconds, "--slept", "2")
    assert [(point["operations"], point["stages"]) for point in report["points"]] == [("slept", 2), ("computed", 2)]
    for point in report["points"]:
        megatrons, before, interleaved, zero_bubble_beside, alone, ours, zero_bubble = point["arms"].values()
        assert all(0 < arm["steady"] < 1 and arm["steady_seconds"] > 0 for arm in point["arms"].values())
        assert all(0 < arm["simulated_steady"] < 1 for arm in (before, interleaved, zero_bubble_beside, ours, zero_bubble))
        assert megatrons["ratio"] == alone["ratio"] == 1
        if point["operations"] == "slept":  # real models as small as these are mostly what lies between operations
            assert interleaved["simulated_steady"] < before["simulated_steady"]
            assert zero_bubble_beside["simulated_steady"] < before["simulated_steady"]
            assert zero_bubble["simulated_steady"] < ours["simulated_steady"]


def test_a_step_on_many_gpus_is_predicted_and_a_small_machine_refused(tmp_path):
    report = _forked_report(
        "predict", tmp_path, "--models", "8B", "70B", "--gpus", "8", "--pairs", "64", "--pairs-per-gpu", "16"
    )
    assert [(step["model"], step["pairs"]) for step in report["steps"]] == [("8B", 64), ("8B", 128)], "70B does not fit"
    for step in report["steps"]:
        assert math.isclose(step["seconds"], sum(step["seconds_by"].values())) and 0 < step["mfu"] < 1


@pytest.mark.exhaustive
def test_coupled_objectives_take_turns_with_their_uncoupled_relatives(tmp_path):
    sizes = ("--rounds", "2", "--warm-up", "1", "--pairs", "4", "--vocabulary", "2000")
    report = _forked_report("coupled", tmp_path, "--tiny", *sizes)
    assert [times["coupled"] for times in report["times"]] == ["aot", "bco_pair", "kto"]
    assert all(times["time_ratio"] > 0 and len(times["seconds"]["coupled"]) == 2 for times in report["times"])


def test_trl_and_megadpo_take_turns_on_the_same_pairs(tmp_path):
    pytest.importorskip("trl")
    sizes = ("--rounds", "2", "--warm-up", "1", "--pairs", "2", "--vocabulary", "1000", "--batch-sizes", "1", "2")
    report = _forked_report("against_trl", tmp_path, "--tiny", "--mixes", "prompt-heavy", *sizes)
    (mix,) = report["mixes"]
    assert set(mix["by_batch_size"]) == {"1", "2"}
    assert all(len(entry["trl"]) == len(entry["megadpo"]) == 2 for entry in mix["by_batch_size"].values())
    assert mix["speedup"] == mix["by_batch_size"][str(mix["best_batch_size"])]["speedup"] > 0
    assert 0 < mix["useful_share_of_peak"] < 1


@pytest.mark.exhaustive
def test_adapters_take_turns_with_the_whole_model_and_with_trl_and_peft(tmp_path):
    pytest.importorskip("trl")
    sizes = ("--rounds", "2", "--warm-up", "1", "--pairs", "2", "--vocabulary", "40000", "--batch-sizes", "2")
    report = _forked_report("adapters", tmp_path, "--tiny", "--mixes", "prompt-heavy", *sizes)
    (mix,) = report["mixes"]
    found = mix["by_batch_size"]["2"]
    assert {arm: len(seconds) for arm, seconds in found["seconds"].items()} == {"whole": 2, "adapters": 2, "trl": 2}
    assert found["ratios"]["whole"] > 0 < found["ratios"]["trl"]
    assert mix["peak_mib"]["adapters"] < mix["peak_mib"]["whole"]


@pytest.mark.exhaustive
def test_memory_of_both_trainers_is_measured_in_processes_of_their_own(tmp_path):
    pytest.importorskip("trl")
    sizes = ("--pairs", "2", "--vocabulary", "1000", "--batch-sizes", "1", "--capacities", "2048")
    report = _forked_report("memory_against_trl", tmp_path, "--tiny", "--mixes", "prompt-heavy", *sizes)
    (mix,) = report["mixes"]
    assert mix["trl"]["1"]["extra_mib"] > 0 < mix["megadpo"]["2048"]["extra_mib"]
    assert mix["ratio_of_least"] == mix["megadpo"]["2048"]["extra_mib"] / mix["trl"]["1"]["extra_mib"]


def test_simulated_idle_shares_are_those_of_the_documentation():
    from benchmarks import simulated

    lines = (ROOT / "benchmarks" / "results.md").read_text().splitlines()
    documented = [line.strip("| ").split(" | ") for line in lines if re.match(r"\| \d+ \| \d+ \| 0\.", line)]

    def says(cell: str, number: float) -> bool:
        return abs(float(cell) - number) <= 0.51 * 10 ** -len(cell.partition(".")[2])

    for size in simulated.SIZES:
        for row in (simulated.reference_row(*size), simulated.row(*size)):
            assert any(len(cells) == len(row) and all(map(says, cells, row)) for cells in documented), row


@pytest.mark.exhaustive
def test_whole_epochs_of_both_trainers_with_a_cached_reference_take_turns(tmp_path):
    pytest.importorskip("trl")
    sizes = ("--rounds", "1", "--warm-up", "0", "--steps", "2", "--pairs", "2", "--vocabulary", "1000")
    report = _forked_report("epoch_against_trl", tmp_path, "--tiny", "--mixes", "prompt-heavy", *sizes)
    (point,) = report["points"]
    assert point["epochs"] == 1 and all(len(seconds) == 1 for seconds in point["seconds"].values())
    assert point["speedup"] > 0


@pytest.mark.exhaustive
def test_cost_is_measured_against_what_it_grows_with_and_in_layouts_of_two_processes(tmp_path):
    sizes = ("--rounds", "1", "--factors", "1", "2", "--hidden", "32")
    report = _report("scaling", tmp_path, "--tiny", *sizes)
    assert [growth["what"] for growth in report["growth"]] == ["pairs", "length", "vocabulary", "layers"]
    assert all(len(growth["seconds"]) == 2 for growth in report["growth"])
    assert [point["layout"] for point in report["processes"]] == ["one process", "data 2", "tensor 2", "pipeline 2"]


@pytest.mark.exhaustive
def test_attention_is_timed_and_weighed_every_way(tmp_path):
    sizes = ("--pairs", "2", "--lengths", "--heads", "2", "--key-value-heads", "1", "--head-dim", "16")
    report = _report("attention", tmp_path, "--mixes", "prompt-heavy", "--rounds", "2", *sizes)
    (point,) = report["points"]
    assert set(point["seconds"]) == set(point["mib"]) == {"cpu_flash", "sdpa", "cpu_flash, prompts twice", "padded"}
    assert all(len(seconds) == 2 for seconds in point["seconds"].values())
    assert point["ratios"]["cpu_flash"] == 1


@pytest.mark.exhaustive
def test_experts_are_multiplied_every_way_to_the_same_numbers(tmp_path):
    sizes = ("--tokens", "32", "--hidden", "32", "--columns", "16", "--per-token", "2")
    report = _report("experts", tmp_path, "--experts", "4", "--rounds", "2", *sizes)
    (point,) = report["points"]
    assert set(point["seconds"]) == set(point["differences"]) == {"loop", "grouped", "grouped_mm"}
    assert max(point["differences"].values()) <= 1e-5 and point["differences"]["loop"] == 0


@pytest.mark.exhaustive
def test_memory_of_a_long_pair_is_measured_drawn_and_gone_on_from(tmp_path):
    known = {"arm": "context 2", "tokens": 256, "peak_gib": [0.25, 0.25], "sum_gib": 0.5, "seconds": 1.0}
    (tmp_path / "long_context.json").write_text(json.dumps({"points": [known]}))
    sizes = ("--hidden", "64", "--layers", "2", "--vocabulary", "512", "--arms", "context 2")
    chart = tmp_path / "chart.svg"
    report = _report("long_context", tmp_path, "--tokens", "256", "512", "--svg", str(chart), *sizes)
    kept, point = report["points"]
    assert kept == known
    assert (point["arm"], point["tokens"], point["loss"]) == ("context 2", 512, math.log(2)), "policy is reference"
    assert point["sum_gib"] == sum(point["peak_gib"]) > sum(point["before_gib"]) > 0
    assert chart.read_text().count("<circle") == 2


@pytest.mark.exhaustive
def test_recomputing_and_offloading_keep_little_and_the_report_has_memory_and_times(tmp_path):
    sizes = ("--tokens", "2048", "--layers", "2", "--hidden", "256", "--heads", "4", "--rounds", "1", "--window-mib", "1")
    ways = ("recompute full", "offload disk")
    report = _report("memory", tmp_path, *sizes, "--directory", str(tmp_path), "--ways", *ways)
    kept, recomputed, moved = report["points"]
    assert (kept["way"], recomputed["way"], moved["way"]) == ("kept", *ways)
    assert recomputed["kept_mib"] < 0.3 * kept["kept_mib"] and recomputed["moved_mib"] == 0
    assert moved["kept_mib"] < 0.4 * kept["kept_mib"] and moved["moved_mib"] > 0.7 * kept["kept_mib"]
    assert all(point["time_ratio"] > 0 for point in report["points"])


@pytest.mark.exhaustive
def test_bf16_and_fp32_steps_take_turns(tmp_path):
    sizes = ("--rounds", "2", "--pairs", "4", "--vocabulary", "2000")
    report = _forked_report("precision", tmp_path, "--tiny", "--steps-only", *sizes)
    assert report["steps"]["time_ratio"] > 0 and len(report["steps"]["seconds"]["bf16"]) == 2
    assert report["steps"]["losses"]["bf16"] == pytest.approx(report["steps"]["losses"]["fp32"], rel=0.02)


@pytest.mark.exhaustive
def test_the_way_of_the_data_is_measured_from_rows_to_steps(tmp_path):
    sizes = ("--rows", "150", "--groups", "3000", "--pairs", "64", "--pairs-per-step", "16", "--capacities", "2048")
    report = _report("data", tmp_path, "--tiny", "--rounds", "1", "--replicas", "2", "--vocabulary", "1000", *sizes)
    assert [line["rows"] for line in report["tokenising"]] == ["text", "conversations"]
    assert all(line["num_rows"] == 150 and line["speed_ratio"] > 0 for line in report["tokenising"])
    assert all(line["pairs_per_second"] > 0 for line in report["micro_batches"])
    (preferences, *_), (steps, *_) = report["packing"], report["filled"]
    assert preferences["filled_2048"] > 0.985 and steps["composed"] > 0.985 > steps["drawn"]
    assert all(1 <= line["mean"] <= 1.05 for line in report["balance"])
    assert set(report["waiting"]["waited"]) == {"made ahead", "made in the step"}


def test_saves_and_loads_are_timed_in_turns(tmp_path):
    report = _forked_report("checkpoints", tmp_path, "--tiny", "--rounds", "2", "--directory", str(tmp_path))
    assert report["save"]["bytes"] > 1_000_000
    assert all(len(values) == 2 for part in ("save", "load") for values in report[part]["seconds"].values())
    assert set(report["ratios"]) >= {"stall: behind / in the loop", "hashing, of a core / save in the loop"}
    assert all(ratio > 0 for ratio in report["ratios"].values())
