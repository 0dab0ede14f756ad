"""Virtual and uneven pipeline stages: more stages than two, every kind of objective, and whole runs with a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megadpo.config.schema import ObjectiveConfig
from megadpo.parallel.layout import Layout
from tests.helpers import oracle
from tests.helpers.models import random_groups, save_model, write_hh
from tests.helpers.runs import assert_same_weights, resumed_and_whole, train_run
from tests.helpers.worlds import run_world
from tests.parity.worker import Case, outcomes, outcomes_of_objectives

pytestmark = pytest.mark.slow

FOUR_STAGES = [
    Case(Layout(pipeline=4, virtual=2), tokens_per_micro_batch=90),
    Case(Layout(pipeline=4), tokens_per_micro_batch=90),
    Case(Layout(pipeline=2, virtual=3, data=2, chunk_layers=(1, 2, 2, 2, 1, 1))),
    Case(Layout(pipeline=2, virtual=2, context=2, context_method="ulysses"), tokens_per_micro_batch=90),
    Case(Layout(pipeline=2, virtual=2, context=2, context_method="allgather"), tokens_per_micro_batch=90),
    Case(Layout(pipeline=2, context=2, context_method="allgather", chunk_layers=(5, 4))),
    Case(Layout(pipeline=2, tensor=2, sequence=True, chunk_layers=(4, 5))),
]
OFTEN = [FOUR_STAGES[n] for n in (0, 2, 3)]
"""Each time: four stages, uneven chunks, and virtual stages with context or data parallelism beside them."""


@pytest.mark.parametrize("cases", [OFTEN, pytest.param(FOUR_STAGES, marks=pytest.mark.exhaustive)], ids=["often", "all"])
def test_four_stages_of_two_chunks_and_nine_uneven_layers_equal_one_process(tmp_path, cases):
    policy = save_model(tmp_path / "policy", "llama", num_hidden_layers=9, tie_word_embeddings=True)
    reference = save_model(tmp_path / "reference", "llama", seed=1, num_hidden_layers=9, tie_word_embeddings=True)
    groups = random_groups(9, seed=3)
    before = {name: tensor.clone() for name, tensor in oracle.load(policy).named_parameters()}
    base = run_world(1, outcomes, policy, reference, groups, [Case(Layout())], 3)[0][0]
    found = run_world(4, outcomes, policy, reference, groups, cases, 3)[0]
    moved = torch.stack([(base.weights[name] - before[name]).double().norm() for name in before]).norm()
    for case, outcome in zip(cases, found, strict=True):
        oracle.assert_same_step(case, outcome, base)
        apart = torch.stack([(outcome.weights[name] - base.weights[name]).double().norm() for name in before]).norm()
        assert float((apart / moved).detach()) <= 1e-4, str(case)


OBJECTIVES = [
    ObjectiveConfig(loss_type="aot"),
    ObjectiveConfig(loss_type=["kto", "sft"]),
    ObjectiveConfig(loss_type="plackett_luce"),
    ObjectiveConfig(loss_type="reward"),
]
FEW_GROUPS = 3
"""Fewer than 2 replicas x 2 micro-batches: some micro-batches are empty."""


def test_empty_micro_batches_that_fill_a_round_add_nothing_to_any_objective(tmp_path):
    policy = save_model(tmp_path / "policy")
    reference = save_model(tmp_path / "reference", seed=1)
    kinds = ("pairs", "lists", "labels")
    groups = {kind: random_groups(FEW_GROUPS, seed=5, kind=kind) for kind in kinds}
    base = run_world(1, outcomes_of_objectives, policy, reference, groups, [Case(Layout())], OBJECTIVES)[0][0]
    case = Case(Layout(pipeline=2, virtual=2, data=2))
    found = run_world(4, outcomes_of_objectives, policy, reference, groups, [case], OBJECTIVES)[0][0]
    for objective, alone, outcome in zip(OBJECTIVES, base, found, strict=True):
        worst, name = oracle.worst_relative_error(outcome.gradients, alone.gradients)
        assert worst <= 1e-5, f"{objective.loss_types}: {name} {worst}"
        assert outcome.loss == pytest.approx(alone.loss, rel=1e-6), objective.loss_types
        assert outcome.grad_norm == pytest.approx(alone.grad_norm, rel=1e-5), objective.loss_types


PARALLEL = {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layout": "2,1,1,1"}


def test_a_run_with_a_precomputed_reference_evaluates_resumes_bit_for_bit_and_exports(tmp_path):
    model = save_model(tmp_path / "model", "qwen3", num_hidden_layers=5, tie_word_embeddings=True)
    rows = write_hh(tmp_path / "rows.jsonl", 30)

    def settings(name: str, parallel: dict[str, Any]) -> dict[str, Any]:
        return {
            "model": {"path": str(model), "dtype": "fp32"},
            "reference": {"mode": "precomputed"},
            "data": {"train": str(rows), "eval": str(rows), "max_length": 128, "cache_dir": str(tmp_path / f"{name}-cache")},
            "train": {"steps": 4, "pairs_per_step": 5, "tokens_per_micro_batch": 300, "learning_rate": 1e-3},
            "eval": {"pairs": 7},
            "checkpoint": {"every": 2},
            "logging": {"tensorboard": False},
            "parallel": parallel,
            "output_dir": str(tmp_path / name),
        }

    alone = run_world(1, train_run, settings("alone", {}))[0]
    resumed, whole = resumed_and_whole(2, lambda name: settings(name, PARALLEL), 3)
    assert resumed == whole and len(whole) == 4 and "eval_loss" in whole[-1]
    for ours, theirs in zip(whole, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert_same_weights(tmp_path / "broken", tmp_path / "whole")
    oracle.load(tmp_path / "whole" / "hf")
