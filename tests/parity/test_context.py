"""Context parallelism changes nothing: the same loss, gradients and updates as one process, by both methods."""

from __future__ import annotations

import pytest
import torch

from megadpo.config import ObjectiveConfig
from megadpo.parallel.layout import Layout
from tests.models import random_groups, save_model
from tests.parity import oracle
from tests.parity.worker import Case, outcomes, outcomes_of_objectives
from tests.worlds import run_world

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
    ],
    4: [
        *(Case(layout(method, tensor=2), tokens_per_micro_batch=SMALL) for method in METHODS),
        *(Case(layout(method, pipeline=2), share_prompts=False) for method in METHODS),
        *(Case(layout(method, data=2), tokens_per_micro_batch=SMALL) for method in METHODS),
        *(Case(layout(method, context=4), tokens_per_micro_batch=SMALL) for method in METHODS),
    ],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The same global batch in every way of computing it: gradients, and weights after three AdamW steps."""
    directory = tmp_path_factory.mktemp("context")
    changes = {"num_hidden_layers": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
    policy = save_model(directory / "policy", "qwen3", **changes)
    reference = save_model(directory / "reference", "qwen3", seed=1, **changes)
    groups = random_groups(13, seed=3)
    before = {name: tensor.clone() for name, tensor in oracle.load(policy).named_parameters()}
    cases = [case for some in CASES.values() for case in some]
    found = [
        outcome
        for num_processes, some in CASES.items()
        for outcome in run_world(num_processes, outcomes, policy, reference, groups, some, 3)[0]
    ]
    return before, list(zip(cases, found, strict=True))


def test_log_probs_loss_and_gradients_are_those_of_one_process(trained):
    _, found = trained
    base = found[0][1]
    for case, outcome in found[1:]:
        worst, name = oracle.worst_relative_error(outcome.gradients, base.gradients)
        assert worst <= 1e-5, f"{case}: {name} {worst}"
        assert outcome.grad_norm == pytest.approx(base.grad_norm, rel=1e-5), str(case)
        assert outcome.loss == pytest.approx(base.loss, rel=1e-6), str(case)
        assert torch.allclose(outcome.logps, base.logps, rtol=0, atol=1e-4), str(case)


def test_weights_after_three_steps_too(trained):
    before, found = trained
    base = found[0][1].weights
    moved = torch.stack([(base[name] - before[name]).double().norm() for name in before]).norm()
    for case, outcome in found[1:]:
        apart = torch.stack([(outcome.weights[name] - base[name]).double().norm() for name in before]).norm()
        assert float(apart / moved) <= 1e-4, f"{case}: {float(apart / moved)}"
