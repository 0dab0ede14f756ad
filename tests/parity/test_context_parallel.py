"""Context parallelism changes nothing: the same loss, gradients and updates as one process, by both methods."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megadpo.data.groups import Group
from megadpo.parallel.layout import Layout
from tests.helpers import oracle
from tests.helpers.models import random_groups, save_model
from tests.helpers.worlds import run_world
from tests.parity.measure import material_of_every_kind, trained_outcomes
from tests.parity.worker import Case, outcomes, outcomes_of_objectives

METHODS = ("ulysses", "allgather")
SMALL = 90  # tokens: a group or two a micro-batch


def layout(method: str, **sizes: int) -> Layout:
    return Layout(context=sizes.pop("context", 2), context_method=method, sequence=sizes.get("tensor", 1) > 1, **sizes)


CASES = {
    1: [Case(Layout())],
    2: [
        *(Case(layout(method)) for method in METHODS),
        *(Case(layout(method), share_prompts=False, tokens_per_micro_batch=SMALL) for method in METHODS),
        Case(layout("ulysses"), recompute="full"),
        Case(layout("allgather"), recompute="selective"),
        *(Case(layout(method), recompute="small") for method in METHODS),
    ],
    3: [Case(layout("allgather", context=3))],
    4: [
        *(Case(layout(method, tensor=2), tokens_per_micro_batch=SMALL) for method in METHODS),
        *(Case(layout(method, pipeline=2), share_prompts=False) for method in METHODS),
        *(Case(layout(method, data=2), tokens_per_micro_batch=SMALL) for method in METHODS),
        *(Case(layout(method, context=4), tokens_per_micro_batch=SMALL) for method in METHODS),
    ],
}


OFTEN = {1: CASES[1], 2: [CASES[2][n] for n in (0, 3, 4)], 3: CASES[3], 4: [CASES[4][n] for n in (0, 3, 7)]}
"""Both methods, recomputation, three and four ranks, and each other kind of parallelism beside them (data: below)."""


@pytest.fixture(scope="module", params=[OFTEN, pytest.param(CASES, marks=pytest.mark.exhaustive)], ids=["often", "all"])
def trained(request, tmp_path_factory):
    """The same global batch in every way of computing it: gradients, and weights after three AdamW steps."""
    changes = {"num_hidden_layers": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return trained_outcomes(tmp_path_factory.mktemp("context"), changes, request.param, scores=True)


@pytest.mark.slow
def test_log_probs_loss_and_gradients_are_those_of_one_process(trained):
    _, found = trained
    base = found[0][1]
    for case, outcome in found[1:]:
        oracle.assert_same_step(case, outcome, base)
        assert torch.allclose(outcome.logps, base.logps, rtol=0, atol=1e-4), str(case)


@pytest.mark.slow
def test_weights_after_three_steps_too(trained):
    before, found = trained
    base = found[0][1].weights
    moved = torch.stack([(base[name] - before[name]).double().norm() for name in before]).norm()
    for case, outcome in found[1:]:
        apart = torch.stack([(outcome.weights[name] - base[name]).double().norm() for name in before]).norm()
        difference = float(apart.detach() / moved.detach())
        assert difference <= 1e-4, f"{case}: {difference}"


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 12}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    ],
)
@pytest.mark.slow
def test_sliding_windows_look_over_the_cuts(tmp_path, family, changes):
    policy = save_model(tmp_path / "policy", family, num_hidden_layers=2, **changes)
    reference = save_model(tmp_path / "reference", family, seed=1, num_hidden_layers=2, **changes)
    groups = random_groups(6, seed=4)
    (base,) = run_world(1, outcomes, policy, reference, groups, [Case(Layout())])[0]
    cases = [Case(layout(method)) for method in METHODS]
    for case, outcome in zip(cases, run_world(2, outcomes, policy, reference, groups, cases)[0], strict=True):
        worst, name = oracle.worst_relative_error(outcome.gradients, base.gradients)
        assert worst <= 1e-5, f"{case}: {name} {worst}"


@pytest.mark.slow
def test_streams_shorter_than_the_ranks_and_replicas_without_any_group(tmp_path):
    policy = save_model(tmp_path / "policy", "llama", num_hidden_layers=2)
    reference = save_model(tmp_path / "reference", "llama", seed=1, num_hidden_layers=2)
    groups = [Group((np.array([5]),), (np.array([7]), np.array([9])), 0)]  # three tokens
    (base,) = run_world(1, outcomes, policy, reference, groups, [Case(Layout())])[0]
    cases = [Case(layout(method, context=4)) for method in METHODS] + [Case(layout(m, data=2)) for m in METHODS]
    for case, outcome in zip(cases, run_world(4, outcomes, policy, reference, groups, cases)[0], strict=True):
        worst, name = oracle.worst_relative_error(outcome.gradients, base.gradients)
        assert worst <= 1e-5, f"{case}: {name} {worst}"
        assert outcome.grad_norm == pytest.approx(base.grad_norm, rel=1e-5), str(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.slow
def test_a_resident_reference_gives_margins_of_exactly_zero_at_step_0(tmp_path, dtype):
    policy = save_model(tmp_path / "policy", "llama", num_hidden_layers=2)
    cases = [Case(layout(method)) for method in METHODS]
    found = run_world(2, outcomes, policy, policy, random_groups(8), cases, 0, dtype)[0]
    for case, outcome in zip(cases, found, strict=True):
        assert len(outcome.margins) >= 8 and not outcome.margins.any(), str(case)
        assert outcome.loss == pytest.approx(0.6931471805599453, abs=1e-6), str(case)


OBJECTIVES = [
    {"ld_alpha": 0.3, "wpo": True, "nll_coef": 0.2},
    {"loss_type": "orpo"},
    {"loss_type": "aot"},
    {"loss_type": "kto"},
    {"loss_type": "bco_pair", "bco_running_delta": True},
    {"loss_type": "reward"},
    {"loss_type": "plackett_luce"},
    {"loss_type": "rpo_fwd_kl"},
]


@pytest.fixture(scope="module")
def by_objective(tmp_path_factory):
    """[case][objective] -> outcome."""
    *material, objectives = material_of_every_kind(tmp_path_factory.mktemp("objectives"), OBJECTIVES)
    (base,) = run_world(1, outcomes_of_objectives, *material, [Case(Layout())], objectives)[0]
    cases = [Case(layout("ulysses"), tokens_per_micro_batch=180), Case(layout("allgather"))]
    found = run_world(2, outcomes_of_objectives, *material, cases, objectives)[0]
    return base, list(zip(cases, found, strict=True))


@pytest.mark.parametrize("number", range(len(OBJECTIVES)), ids=[str(options) for options in OBJECTIVES])
@pytest.mark.slow
def test_objectives_of_any_kind_read_whole_responses(by_objective, number):
    base, found = by_objective[0][number], by_objective[1]
    for case, of_case in found:
        outcome = of_case[number]
        worst, name = oracle.worst_relative_error(outcome.gradients, base.gradients)
        assert worst <= 1e-5, f"{case}: {name} {worst}"
        assert outcome.loss == pytest.approx(base.loss, rel=1e-6, abs=1e-7), str(case)
        assert outcome.grad_norm == pytest.approx(base.grad_norm, rel=1e-5), str(case)
