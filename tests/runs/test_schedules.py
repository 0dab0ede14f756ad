"""Whole runs with our schedule and the reference in its bubbles: metrics, resumption and export are those of Megatron's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megadpo.errors import UserError
from megadpo.validation.load import load_config
from tests.helpers.models import save_model, write_hh
from tests.helpers.runs import exported_weights, run_settings, train_each, train_run
from tests.helpers.worlds import run_world

INTERLEAVED = {"name": "1f1b", "reference": "interleaved"}
SPLIT = ("schedule.name=1f1b", "schedule.split_pairs=true", "parallel.pipeline=2")
SIMPO = ("objective.loss_type=simpo", "reference.mode=none")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    save_model(directory / "model", "llama", num_hidden_layers=4, tie_word_embeddings=True)
    write_hh(directory / "train.jsonl", 40)
    return directory


@pytest.mark.slow
def test_a_resumed_run_that_runs_ahead_gives_the_bits_of_megatrons_schedule(files: Path, tmp_path: Path) -> None:
    def settings(name: str, schedule: dict[str, str]) -> dict[str, Any]:
        return run_settings(
            files,
            tmp_path / name,
            schedule=schedule,
            reference={"sync_every": 3, "mixup_alpha": 0.6},
            parallel={"pipeline": 2},
            train={"steps": 5, "warmup_steps": 0, "tokens_per_micro_batch": 600},
            data={"eval": str(files / "train.jsonl")},
            eval={"every": 2, "pairs": 6},
            checkpoint={"every": 2},
        )

    theirs = run_world(2, train_run, settings("theirs", {}))[0]
    run_world(2, train_run, settings("ours", INTERLEAVED), 3)
    runs = [settings("ours", INTERLEAVED), settings("apart", INTERLEAVED | {"split_pairs": True})]
    runs.append(settings("delayed", INTERLEAVED | {"zero_bubble": True}))
    ours, apart, delayed = run_world(2, train_each, runs)[0]
    assert ours == theirs and "eval_loss" in ours[1] and ours[0]["rewards/margins"] == 0.0
    weights, others = exported_weights(tmp_path / "ours"), exported_weights(tmp_path / "theirs")
    assert all(torch.equal(weights[name], others[name]) for name in others)
    assert apart[0]["rewards/margins"] == delayed[0]["rewards/margins"] == 0.0
    for record, whole in zip((*apart, *delayed), (*theirs, *theirs), strict=True):
        assert record == pytest.approx(whole, rel=1e-4, abs=1e-6), "over several steps"


@pytest.mark.slow
def test_kto_s_kl_is_computed_before_the_interleaved_step(files: Path, tmp_path: Path) -> None:
    def settings(name: str, schedule: dict[str, str]) -> dict[str, Any]:
        return run_settings(
            files,
            tmp_path / name,
            schedule=schedule,
            objective={"loss_type": "kto"},
            parallel={"pipeline": 2},
            train={"steps": 3, "warmup_steps": 0, "tokens_per_micro_batch": 600},
        )

    theirs, ours = run_world(2, train_each, [settings("theirs", {}), settings("ours", INTERLEAVED)])[0]
    assert ours == theirs


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (SPLIT[:2], "without pipeline stages there is no bubble to shorten; set it to false"),
        (["schedule.split_pairs=true"], "Megatron's schedules run whole micro-batches; set schedule.name to 1f1b"),
        (
            [*SPLIT, "objective.loss_type=plackett_luce"],
            "schedule.split_pairs is true, but it sends the two answers of a pair one after the other",
        ),
        ([*SPLIT, "objective.loss_type=bco"], "objective.loss_type reads rows that are no pairs; set it to false"),
        (["schedule.name=zero-bubble"], "schedule.name: 'zero-bubble' is not known; choose one of: megatron, 1f1b"),
        (["schedule.zero_bubble=true"], "Megatron's schedules do a backward in one; set schedule.name to 1f1b"),
        (["schedule={name: 1f1b, zero_bubble: true}"], "without pipeline stages there is no bubble to fill"),
        (["schedule.reference=interleaved", "parallel.pipeline=2"], "set schedule.name to 1f1b"),
        (["schedule.reference=interleaved", "schedule.name=1f1b"], "without pipeline stages there are no bubbles"),
        (
            ["schedule={name: 1f1b, reference: interleaved}", "parallel.pipeline=2", *SIMPO],
            "schedule.reference is interleaved, but reference.mode is none",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config({}, overrides)
    assert message in str(caught.value)
