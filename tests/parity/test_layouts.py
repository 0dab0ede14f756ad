"""Every layout computes what plain transformers computes: log-probs, loss and gradients, on real rows and four families."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from megadpo.config.schema import ObjectiveConfig
from megadpo.data.groups import Group
from megadpo.parallel.layout import Layout
from tests.helpers import oracle
from tests.helpers.models import hh_groups, random_groups, save_model
from tests.helpers.worlds import run_world
from tests.parity.measure import trained_outcomes
from tests.parity.worker import Case, outcomes

FAMILIES = {
    "llama": {},
    "llama-tied-rope-scaled": {
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2": {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
    "qwen3-tied": {"tie_word_embeddings": True},
    "mistral": {},
}
CASES = {
    1: [Case(Layout()), Case(Layout(), share_prompts=False), Case(Layout(), tokens_per_micro_batch=2500)],
    2: [
        Case(Layout(tensor=2)),
        Case(Layout(tensor=2, sequence=True)),
        Case(Layout(tensor=2, sequence=True), share_prompts=False),
        Case(Layout(pipeline=2)),
        Case(Layout(data=2)),
    ],
    4: [Case(Layout(tensor=2, pipeline=2, sequence=True)), Case(Layout(pipeline=2, data=2), share_prompts=False)],
}
BETA = 0.1


OFTEN = {
    "llama": {1: CASES[1], 2: CASES[2][1:3] + CASES[2][4:], 4: CASES[4][:1]},
    "qwen3-tied": {1: CASES[1][:1], 2: CASES[2][:1] + CASES[2][3:4], 4: CASES[4][1:]},
}
"""Measured each time: every case with one of two models. The others' layers are in test_families.py's kit too."""


@pytest.fixture(
    scope="module",
    params=[
        *((name, True) for name in OFTEN),
        *(pytest.param((name, False), marks=pytest.mark.exhaustive) for name in FAMILIES),
    ],
    ids=lambda param: f"{param[0]}, often" if param[1] else param[0],
)
def measured(request, tmp_path_factory):
    """A policy, a reference and 9 real pairs: what transformers says, and what every case says."""
    name, is_often = request.param
    some_cases = OFTEN[name] if is_often else CASES
    directory = tmp_path_factory.mktemp(name)
    family = name.split("-")[0]
    changes = {"num_hidden_layers": 2, **FAMILIES[name]}
    policy = save_model(directory / "policy", family, **changes)
    reference = save_model(directory / "reference", family, seed=1, **changes)
    groups = hh_groups(9, policy, max_length=160)
    objective = ObjectiveConfig(beta=BETA, label_smoothing=0.1)
    model = oracle.load(policy)
    reference_logps = oracle.all_logps(oracle.load(reference), groups)
    loss, gradients = oracle.dpo_step(model, groups, reference_logps, BETA, 0.1)
    expected = oracle.all_logps(model, groups), loss, gradients
    cases = [case for some in some_cases.values() for case in some]
    measure = functools.partial(outcomes, objective=objective)
    found = [
        outcome
        for num_processes, some in some_cases.items()
        for outcome in run_world(num_processes, measure, policy, reference, groups, some)[0]
    ]
    return expected, list(zip(cases, found, strict=True))


@pytest.mark.slow
def test_response_log_probs_equal_transformers(measured):
    (logps, _, _), found = measured
    for case, outcome in found:
        worst = float((outcome.logps.view_as(logps) - logps).abs().max())
        assert worst <= 1e-4, f"{case}: {worst}"


@pytest.mark.slow
def test_the_loss_equals_plain_transformers(measured):
    (_, loss, _), found = measured
    for case, outcome in found:
        assert outcome.loss == pytest.approx(loss, rel=1e-6), str(case)


@pytest.mark.slow
def test_every_gradient_equals_plain_transformers(measured):
    (_, _, gradients), found = measured
    norm = float(torch.stack([g.double().norm() for g in gradients.values()]).norm())
    for case, outcome in found:
        worst, name = oracle.worst_relative_error(outcome.gradients, gradients)
        assert worst <= 1e-5, f"{case}: {name} {worst}"
        assert outcome.grad_norm == pytest.approx(norm, rel=1e-5), str(case)


@pytest.mark.slow
def test_a_gradient_off_by_one_percent_is_noticed(measured):
    (_, _, gradients), found = measured
    for name in gradients:
        scaled = found[0][1].gradients | {name: found[0][1].gradients[name] * 1.01}
        tiny = float(gradients[name].norm()) < 1e-4 * max(float(g.norm()) for g in gradients.values())
        worst, _ = oracle.worst_relative_error(scaled, gradients)
        assert worst > 1e-5 or tiny, name


INVARIANCE = {
    1: [
        Case(Layout()),
        Case(Layout(), share_prompts=False),
        Case(Layout(), tokens_per_micro_batch=90),
        Case(Layout(), recompute="full"),
        Case(Layout(), recompute="selective"),
    ],
    2: [
        Case(Layout(tensor=2)),
        Case(Layout(tensor=2, sequence=True), tokens_per_micro_batch=90),
        Case(Layout(pipeline=2)),
        Case(Layout(pipeline=2), share_prompts=False, tokens_per_micro_batch=90, recompute="full"),
        Case(Layout(data=2), tokens_per_micro_batch=90),
        Case(Layout(data=2), share_prompts=False),
    ],
    4: [
        Case(Layout(tensor=2, pipeline=2, sequence=True)),
        Case(Layout(tensor=2, pipeline=2), share_prompts=False),
        Case(Layout(tensor=2, data=2, sequence=True), tokens_per_micro_batch=90),
        Case(Layout(pipeline=2, data=2)),
        Case(Layout(tensor=4)),
        Case(Layout(data=4)),
    ],
}
MANY_STAGES = {
    1: [Case(Layout())],
    2: [
        Case(Layout(pipeline=2, virtual=2), tokens_per_micro_batch=90),
        Case(Layout(pipeline=2, virtual=2), share_prompts=False, recompute="full"),
        Case(Layout(pipeline=2, chunk_layers=(3, 1)), tokens_per_micro_batch=90),
    ],
    4: [
        Case(Layout(tensor=2, pipeline=2, sequence=True, virtual=2), tokens_per_micro_batch=90),
        Case(Layout(pipeline=2, virtual=2, data=2)),
        Case(Layout(pipeline=2, data=2, chunk_layers=(1, 3))),
        Case(Layout(pipeline=4), tokens_per_micro_batch=90),
    ],
}
"""What two layers are too few for."""
INVARIANCE_OFTEN = {
    1: INVARIANCE[1],
    2: [INVARIANCE[2][n] for n in (1, 3, 4)],
    4: [INVARIANCE[4][n] for n in (1, 4)],
}
MANY_STAGES_OFTEN = {
    1: MANY_STAGES[1],
    2: [MANY_STAGES[2][n] for n in (1, 2)],
    4: [MANY_STAGES[4][n] for n in (0, 3)],
}
"""Measured each time: each kind of layout, alone and with another one."""


@pytest.fixture(
    scope="module",
    params=[
        (2, False, True),
        (4, True, True),
        *(pytest.param((size, tied, False), marks=pytest.mark.exhaustive) for size in (2, 4) for tied in (False, True)),
    ],
    ids=lambda param: f"{'tied' if param[1] else 'untied'}, {param[0]} layers{', often' if param[2] else ''}",
)
def trained(request, tmp_path_factory):
    """The same global batch in every way of computing it: gradients, and weights after three AdamW steps."""
    num_layers, tied, is_often = request.param
    changes = {"tie_word_embeddings": tied, "num_key_value_heads": 4, "num_hidden_layers": num_layers}
    every, often = (INVARIANCE, INVARIANCE_OFTEN) if num_layers == 2 else (MANY_STAGES, MANY_STAGES_OFTEN)
    return trained_outcomes(tmp_path_factory.mktemp("invariance"), changes, often if is_often else every)


@pytest.mark.slow
def test_gradients_do_not_depend_on_layout_micro_batches_or_sharing(trained):
    _, found = trained
    base = found[0][1]
    for case, outcome in found[1:]:
        oracle.assert_same_step(case, outcome, base)


def _difference_of_updates(a: dict, b: dict, before: dict) -> float:
    apart = torch.stack([(a[name].double() - b[name].double()).norm() for name in before]).norm()
    moved = torch.stack([(b[name].double() - before[name].double()).norm() for name in before]).norm()
    return float(apart / moved)


@pytest.mark.slow
def test_weights_after_three_steps_do_not_depend_on_them_either(trained):
    before, found = trained
    base = found[0][1].weights
    for case, outcome in found[1:]:
        difference = _difference_of_updates(outcome.weights, base, before)
        assert difference <= 1e-4, f"{case}: {difference}"


@pytest.mark.slow
def test_an_update_of_nothing_is_noticed(trained):
    before, found = trained
    assert _difference_of_updates(before, found[0][1].weights, before) > 0.9


ZERO = {
    1: [Case(Layout()), Case(Layout(), share_prompts=False)],
    2: [
        Case(Layout(tensor=2)),
        Case(Layout(tensor=2, sequence=True)),
        Case(Layout(pipeline=2)),
        Case(Layout(pipeline=2, virtual=2)),
        Case(Layout(data=2), recompute="full"),
    ],
    4: [Case(Layout(tensor=2, pipeline=2, sequence=True)), Case(Layout(pipeline=2, virtual=2, data=2))],
}
ZERO_OFTEN = {1: ZERO[1], 2: ZERO[2][1:]}


@pytest.mark.parametrize(
    "by_size", [ZERO_OFTEN, pytest.param(ZERO, marks=pytest.mark.exhaustive)], ids=["up to two processes", "all"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.slow
def test_a_resident_reference_gives_margins_of_exactly_zero_at_step_0(tmp_path, dtype, by_size):
    policy: Path = save_model(tmp_path / "policy", "llama")
    groups: list[Group] = random_groups(8)
    for num_processes, cases in by_size.items():
        for case, outcome in zip(
            cases, run_world(num_processes, outcomes, policy, policy, groups, cases, 0, dtype)[0], strict=True
        ):
            assert len(outcome.margins) >= 8 and not outcome.margins.any(), str(case)
            assert outcome.loss == pytest.approx(0.6931471805599453, abs=1e-6), str(case)
