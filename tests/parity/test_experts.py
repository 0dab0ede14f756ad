"""Mixtures of experts compute what plain transformers computes, in every layout: log-probs, loss, gradients, updates."""

from __future__ import annotations

import pytest
import torch

from megadpo.config import ObjectiveConfig
from megadpo.parallel.layout import Layout
from tests.models import hh_groups, random_groups, save_model
from tests.parity import oracle
from tests.parity.worker import Case, outcomes
from tests.worlds import run_world

FAMILIES = {
    "mixtral": {"sliding_window": 64},
    "qwen3_moe": {"mlp_only_layers": [0], "norm_topk_prob": True},
    "qwen3_moe-unnormalised": {"decoder_sparse_step": 2, "num_experts_per_tok": 1, "tie_word_embeddings": True},
}
CASES = {
    1: [Case(Layout()), Case(Layout(), share_prompts=False)],
    2: [
        Case(Layout(data=2)),
        Case(Layout(pipeline=2)),
        Case(Layout(data=2, expert=2), share_prompts=False),
        Case(Layout(tensor=2, sequence=True, expert_tensor=2)),
        Case(Layout(tensor=2, sequence=True, expert=2)),
    ],
    4: [
        Case(Layout(pipeline=2, data=2, expert=2)),
        Case(Layout(tensor=2, data=2, sequence=True, expert=2, expert_tensor=2)),
    ],
}
BETA = 0.1


@pytest.fixture(scope="module", params=list(FAMILIES))
def measured(request, tmp_path_factory):
    """A policy, a reference and real pairs: what transformers says, and what every case says."""
    directory = tmp_path_factory.mktemp(request.param)
    family, changes = request.param.split("-")[0], FAMILIES[request.param]
    policy = save_model(directory / "policy", family, **changes)
    reference = save_model(directory / "reference", family, seed=1, **changes)
    groups = hh_groups(24, policy, max_length=120)
    objective = ObjectiveConfig(beta=BETA)
    model = oracle.load(policy)
    reference_logps = oracle.all_logps(oracle.load(reference), groups)
    loss, gradients = oracle.dpo_step(model, groups, reference_logps, BETA)
    expected = oracle.all_logps(model, groups), loss, gradients
    cases = [case for cases in CASES.values() for case in cases]
    found = [
        outcome
        for num_processes, some in CASES.items()
        for outcome in run_world(num_processes, outcomes, policy, reference, groups, some, 0, torch.float32, objective)[0]
    ]
    return expected, list(zip(cases, found, strict=True))


def test_response_log_probs_equal_transformers(measured):
    (logps, _, _), found = measured
    for case, outcome in found:
        worst = float((outcome.logps.view_as(logps) - logps).abs().max())
        assert worst <= 1e-4, f"{case}: {worst}"


def test_loss_and_every_gradient_equal_transformers_router_and_experts_included(measured):
    (_, loss, gradients), found = measured
    norm = float(torch.stack([g.double().norm() for g in gradients.values()]).norm())
    for case, outcome in found:
        worst, name = oracle.worst_relative_error(outcome.gradients, gradients)
        assert worst <= 1e-5, f"{case}: {name} {worst}"
        assert outcome.grad_norm == pytest.approx(norm, rel=1e-5), str(case)
        assert outcome.loss == pytest.approx(loss, rel=1e-6), str(case)
