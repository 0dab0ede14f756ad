"""Every objective gives the same loss, gradients and updates in every layout, micro-batch size and way of laying out."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from megadpo.config.schema import ObjectiveConfig
from megadpo.data.rows.formats import Reading
from megadpo.objectives.specs import SPECS, reading_of
from megadpo.parallel.layout import Layout
from tests.helpers import oracle
from tests.helpers.worlds import run_world
from tests.parity.measure import material_of_every_kind
from tests.parity.worker import Case, outcomes_of_objectives

pytestmark = pytest.mark.slow

OBJECTIVES: list[dict[str, Any]] = [
    *({"loss_type": name, **({"label_smoothing": 0.1} if name == "exo_pair" else {})} for name in SPECS if name != "custom"),
    {"loss_type": "custom", "module": "examples/custom_objective.py:squared_hinge"},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"ld_alpha": 0.3, "wpo": True, "nll_coef": 0.2},
    {"f_divergence": "js", "length_penalty": 0.01, "dpop_lambda": 1.0},
    {"loss_type": "bco_pair", "bco_running_delta": True},
    {"loss_type": ["kto", "sft"], "desirable_weight": 1.3, "undesirable_weight": 0.8},
    {"loss_type": "all_pairs", "list_weights": "lambda", "nll_coef": 0.1},
    {"margins": True, "row_weights": True, "soft_labels": True},
]
CASES = {
    1: [Case(Layout()), Case(Layout(), share_prompts=False, tokens_per_micro_batch=180)],
    2: [Case(Layout(tensor=2, sequence=True)), Case(Layout(pipeline=2), tokens_per_micro_batch=180), Case(Layout(data=2))],
}


def is_local(objective: ObjectiveConfig) -> bool:
    """Whether nothing but a loss is chosen, and that of a pair is a function of its two answers' log-probs alone: what a
    layout does to one such objective it does to all."""
    specs = [SPECS[name] for name in objective.loss_types]
    is_plain = dataclasses.replace(objective, loss_type="sigmoid", label_smoothing=0.0) == ObjectiveConfig(beta=0.1)
    looks_further = any(s.couples_batch or s.measures_kl or s.runs_delta or s.scores_prompt or s.reward_head for s in specs)
    return is_plain and len(specs) == 1 and reading_of(objective) == Reading() and not looks_further


def tried_in(cases: list[Case], objectives: list[ObjectiveConfig], every: bool) -> list[list[int]]:
    """For each case the numbers of the objectives in it: all of them where one process has it; else those that are local
    take turns."""
    turns, found = itertools.count(), [[] for _ in cases]
    for number, objective in enumerate(objectives):
        turn = next(turns) % len(cases) if is_local(objective) and cases[0].layout.world_size > 1 and not every else None
        for place, of_case in enumerate(found):
            if turn in (None, place):
                of_case.append(number)
    return found


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["often", "all"])
def measured(request, tmp_path_factory):
    """Each case with its outcomes by the number of the objective, and the weights before."""
    *material, objectives = material_of_every_kind(tmp_path_factory.mktemp("objectives"), OBJECTIVES)
    found = []
    for num_processes, cases in CASES.items():
        chosen = tried_in(cases, objectives, request.param)
        of_cases = run_world(num_processes, outcomes_of_objectives, *material, cases, objectives, chosen)[0]
        found += [
            (case, dict(zip(numbers, outcomes, strict=True)))
            for case, numbers, outcomes in zip(cases, chosen, of_cases, strict=True)
        ]
    before = {name: tensor.clone() for name, tensor in oracle.load(material[0]).named_parameters()}
    return before, found


@pytest.mark.parametrize("number", range(len(OBJECTIVES)), ids=[str(options) for options in OBJECTIVES])
def test_an_objective_is_the_same_in_every_layout(measured, number):
    before, found = measured
    base = found[0][1][number]
    assert base.grad_norm > 1e-4
    with_it = [(case, outcomes[number]) for case, outcomes in found[1:] if number in outcomes]
    assert {case.layout.world_size for case, _ in with_it} == {1, 2}
    for case, outcome in with_it:
        worst, name = oracle.worst_relative_error(outcome.gradients, base.gradients)
        assert worst <= 1e-5, f"{case}: {name} {worst}"
        assert outcome.loss == pytest.approx(base.loss, rel=1e-6, abs=1e-7), str(case)
        assert outcome.grad_norm == pytest.approx(base.grad_norm, rel=1e-5), str(case)
        trained = before.keys() & base.weights.keys()  # a reward model has another head
        apart = torch.stack([(outcome.weights[n] - base.weights[n]).double().norm() for n in trained]).norm()
        moved = torch.stack([(base.weights[n] - before[n]).double().norm() for n in trained]).norm()
        # Adam's first step is nearly the gradient's sign: elements with next to no gradient carry the rounding.
        assert float(apart.detach() / moved.detach()) <= 1e-3, str(case)
