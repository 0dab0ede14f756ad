"""Reward modelling as a whole: a language model in, a classifier that transformers loads out, the same in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megadpo.checkpoint.convert import export_checkpoint
from tests.helpers.checkpoints import assert_same, load_reward_model, tensors_of
from tests.helpers.models import groups_of_file, save_model, write_hh
from tests.helpers.runs import assert_same_weights, resumed_and_whole, run_settings, train_run
from tests.helpers.worlds import run_world

pytestmark = pytest.mark.slow

NUM_PAIRS = 16


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied language model with a tokenizer, and pairs that all fit into one step."""
    directory = tmp_path_factory.mktemp("files")
    save_model(directory / "model", "qwen3", tie_word_embeddings=True)
    write_hh(directory / "train.jsonl", NUM_PAIRS)
    return directory


def settings_of(files: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    settings = run_settings(files, output_dir, objective={"loss_type": "reward"}, reference={"mode": "none"})
    settings["train"] |= {"pairs_per_step": NUM_PAIRS, "steps": 6, "warmup_steps": 0}
    for section, values in changes.items():
        settings[section] = settings.get(section, {}) | values
    return settings


@pytest.fixture(scope="module")
def alone(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, float]], Path]:
    """Metrics and output directory of the run on one process."""
    output_dir = tmp_path_factory.mktemp("alone") / "run"
    return run_world(1, train_run, settings_of(files, output_dir, checkpoint={"every": 6}))[0], output_dir


def test_training_tells_chosen_from_rejected(alone: tuple[list[dict[str, float]], Path]) -> None:
    first, *_, last = alone[0]
    assert last["loss"] < 0.5 * first["loss"] and last["rewards/accuracies"] > first["rewards/accuracies"]
    assert last["rewards/accuracies"] >= 0.9 and last["rewards/margins"] > 0


def test_what_is_exported_gives_in_transformers_the_rewards_that_training_saw(
    files: Path, alone: tuple[list[dict[str, float]], Path], tmp_path: Path
) -> None:
    exported = alone[1] / "hf"
    (first, *_) = run_world(1, train_run, settings_of(files, tmp_path / "on", model={"path": str(exported)}))[0]
    model = load_reward_model(exported)
    with torch.no_grad():
        rewards = torch.tensor(
            [
                [
                    float(model(torch.cat([torch.from_numpy(part).long() for part in parts])[None]).logits)
                    for parts in ((group.prompt_of(k), group.responses[k]) for k in (0, 1))
                ]
                for group in groups_of_file(files / "train.jsonl", exported, max_length=128)
            ]
        )
    margins = rewards[:, 0] - rewards[:, 1]
    assert first["rewards/margins"] == pytest.approx(float(margins.mean()), rel=1e-4)
    assert first["loss"] == pytest.approx(float(-F.logsigmoid(margins).mean()), rel=1e-4)


@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor": 2},
        *(pytest.param(p, marks=pytest.mark.exhaustive) for p in ({"pipeline": 2}, {"tensor": 2, "sequence": False}, {})),
    ],
    ids=["tp-sp", "pp", "tp", "dp"],
)
def test_the_layout_changes_nothing(
    parallel: dict[str, Any], files: Path, alone: tuple[list[dict[str, float]], Path], tmp_path: Path
) -> None:
    settings = settings_of(files, tmp_path / "run", parallel=parallel)
    for ours, theirs in zip(run_world(2, train_run, settings)[0], alone[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    for name, tensor in tensors_of(tmp_path / "run" / "hf").items():
        expected = tensors_of(alone[1] / "hf")[name]
        assert (tensor - expected).norm() < 1e-3 * expected.norm(), name
    load_reward_model(tmp_path / "run" / "hf")


@pytest.mark.parametrize("parallel", [{"pipeline": 2}, pytest.param({"tensor": 2}, marks=pytest.mark.exhaustive)])
def test_a_broken_run_goes_on_bit_for_bit_in_its_layout(parallel: dict[str, Any], files: Path, tmp_path: Path) -> None:
    def settings(name: str) -> dict[str, Any]:
        return settings_of(files, tmp_path / name, parallel=parallel, checkpoint={"every": 3})

    resumed, whole = resumed_and_whole(2, settings, 4)
    assert resumed == whole
    assert_same_weights(tmp_path / "broken", tmp_path / "whole")


def test_a_checkpoint_of_the_run_exports_to_what_the_run_exported(
    alone: tuple[list[dict[str, float]], Path], tmp_path: Path
) -> None:
    export_checkpoint(alone[1] / "checkpoints" / "step_00000006", tmp_path / "hf")
    assert_same(tensors_of(tmp_path / "hf"), tensors_of(alone[1] / "hf"))
    assert load_reward_model(tmp_path / "hf").config.to_diff_dict() | {"_name_or_path": None} == (
        load_reward_model(alone[1] / "hf").config.to_diff_dict() | {"_name_or_path": None}
    )
