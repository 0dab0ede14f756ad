"""Dense families as a user meets them: five steps of DPO, exported and loaded by transformers; converted there and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megadpo.checkpoint.convert import export_checkpoint
from megadpo.checkpoint.importing import import_hf
from tests.helpers import oracle
from tests.helpers.models import hh_groups, save_model, write_hh
from tests.helpers.runs import exported_weights, run_settings, train_each, weights_in
from tests.helpers.worlds import run_world

DEFAULT = ("phi3",)
MORE = (
    "olmo2",
    "glm4",
    "smollm3",
    "granite",
    "ministral",
    "cohere",
    "cohere2",
    "gemma2",
    "gemma3_text",
    "deepseek_v2",
    "deepseek_v3",
    "llama4_text",
)


@pytest.fixture(
    scope="module",
    params=[pytest.param(DEFAULT, id="some"), pytest.param(MORE, id="the others", marks=pytest.mark.exhaustive)],
)
def runs(request, tmp_path_factory) -> dict[str, Path]:
    """The runs' directories by family, all trained in one world of two tensor ranks."""
    found, settings = {}, []
    for family in request.param:
        directory = found[family] = tmp_path_factory.mktemp(family)
        save_model(directory / "model", family, num_hidden_layers=2)
        write_hh(directory / "train.jsonl", 24)
        settings.append(run_settings(directory, directory / "run", parallel={"tensor": 2}))
    metrics = run_world(2, train_each, settings)[0]
    for family, lines in zip(found, metrics, strict=True):
        assert len(lines) == 5 and lines[0]["loss"] == pytest.approx(0.6931472, abs=1e-5), family
        assert lines[-1]["loss"] < lines[0]["loss"], family
    return found


@pytest.mark.slow
def test_what_was_trained_for_five_steps_loads_in_transformers(runs):
    for family, directory in runs.items():
        before, after = weights_in(directory / "model"), exported_weights(directory / "run")
        assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before), family
        groups = hh_groups(2, directory / "model", max_length=64)
        assert torch.isfinite(oracle.all_logps(oracle.load(directory / "run" / "hf"), groups)).all(), family


@pytest.mark.slow
def test_a_model_that_is_cut_into_shards_and_put_together_is_the_same_bit_for_bit(runs, tmp_path):
    for family, directory in runs.items():
        import_hf(directory / "model", tmp_path / family, num_tensor=2, num_pipeline=2)
        export_checkpoint(tmp_path / family, tmp_path / f"{family}-again")
        before, after = weights_in(directory / "model"), weights_in(tmp_path / f"{family}-again")
        assert before.keys() == after.keys(), family
        assert all(torch.equal(before[name], after[name]) for name in before), family
