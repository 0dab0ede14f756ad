"""Runs with NEFTune: the same in every layout, resumed bit for bit, and without noise where nothing is trained."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import resumed_and_whole, run_settings, save_files, train_each, train_run
from tests.helpers.worlds import run_world

LAYOUTS: dict[str, dict[str, Any]] = {
    "data 2": {},
    "tensor 2": {"tensor": 2},
    "pipeline 2": {"pipeline": 2},
    "context 2": {"context": 2},
    "ZeRO-2": {"engine": "deepspeed", "zero_stage": 2},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    return save_files(directory, "qwen3", 24, num_hidden_layers=2, hidden_size=32, intermediate_size=48)


def settings_of(files: Path, output_dir: Path, alpha: float | None = 15.0, **sections: dict[str, Any]) -> dict[str, Any]:
    small = {"steps": 3, "pairs_per_step": 4, "tokens_per_micro_batch": 256, "warmup_steps": 0, "neftune_alpha": alpha}
    return run_settings(files, output_dir, **{**sections, "train": small | sections.get("train", {})})


@pytest.fixture(scope="module")
def alone(files, tmp_path_factory) -> list[list[dict[str, float]]]:
    """In one process, with noise and without."""
    directory = tmp_path_factory.mktemp("alone")
    return run_world(1, train_each, [settings_of(files, directory / str(alpha), alpha) for alpha in (15.0, None)])[0]


def test_noise_changes_what_is_learned(alone):
    noisy, plain = alone
    assert all(abs(one["loss"] - other["loss"]) > 1e-4 for one, other in zip(noisy[1:], plain[1:], strict=True))


@pytest.fixture(scope="module")
def in_layouts(files, tmp_path_factory) -> dict[str, list[dict[str, float]]]:
    """With noise on two processes, which train one run after the other; with DeepSpeed where it is installed."""
    directory, names = (
        tmp_path_factory.mktemp("layouts"),
        [name for name in LAYOUTS if "ZeRO" not in name or find_spec("deepspeed")],
    )
    data = {name: {"share_prompts": name != "tensor 2"} for name in names}
    runs = [settings_of(files, directory / name, parallel=LAYOUTS[name], data=data[name]) for name in names]
    return dict(zip(names, run_world(2, train_each, runs)[0], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_does_not_change_the_noise(layout, in_layouts, alone):
    if layout not in in_layouts:
        pytest.skip("DeepSpeed is not installed")
    for one, other in zip(in_layouts[layout], alone[0], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(files, tmp_path):
    def settings(name: str) -> dict[str, Any]:
        return settings_of(files, tmp_path / name, train={"steps": 4}, checkpoint={"every": 2})

    resumed, whole = resumed_and_whole(2, settings, stop_after=3)
    assert resumed == whole


@pytest.mark.slow
def test_a_reference_that_runs_in_the_policy_s_bubbles_has_no_noise(files, tmp_path):
    """It is the policy's own stage without adapters, whose forwards lie between those that have noise."""
    sections = {"adapter": {"kind": "lora", "rank": 4}, "parallel": {"pipeline": 2}, "train": {"steps": 2}}
    schedules = {"before": {"name": "1f1b"}, "interleaved": {"name": "1f1b", "reference": "interleaved"}}
    runs = [settings_of(files, tmp_path / name, schedule=schedule, **sections) for name, schedule in schedules.items()]
    before, interleaved = run_world(2, train_each, runs)[0]
    for name in ("loss", "rewards/chosen", "rewards/margins", "grad_norm"):
        assert [record[name] for record in interleaved] == pytest.approx([record[name] for record in before], rel=1e-6)


def test_held_out_pairs_and_the_reference_have_no_noise(files, tmp_path):
    """At a rate of 0 only what is trained on sees any: a margin that is not 0 is the noise's."""
    train, data = {"learning_rate": 0.0, "steps": 1}, {"eval": str(files / "eval.jsonl")}
    ((record,),) = run_world(1, train_run, settings_of(files, tmp_path, train=train, data=data))
    assert record["eval_rewards/margins"] == 0 and record["rewards/margins"] != 0
