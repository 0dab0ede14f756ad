"""PiSSA and OLoRA: adapters that begin as a part of the weights, as in PEFT, in every layout and engine."""

from __future__ import annotations

import math

import pytest
import torch

from megadpo.model.activations import Activations
from megadpo.parallel.layout import Layout
from tests.helpers import oracle, peft_oracle
from tests.helpers.marks import all_but_the_first_slow
from tests.helpers.models import random_groups, save_model
from tests.helpers.worlds import run_world
from tests.parity.adapter_worker import Adapted, Case, outcomes

WAYS = {
    1: [Case(), Case(memory=Activations("full"))],
    2: [
        Case(Layout(tensor=2, sequence=True)),
        Case(Layout(tensor=2)),
        Case(Layout(pipeline=2)),
        Case(Layout(data=2), overlap=True),
        Case(Layout(data=2), zero_stage=2),
        Case(Layout(data=2), zero_stage=3),
    ],
}
KINDS = {"pissa": {"target_modules": ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]}, "olora": {"use_rslora": True}}


@pytest.fixture(scope="module", params=all_but_the_first_slow(KINDS))
def measured(request, tmp_path_factory):
    """What PEFT says of the first step, and what every way says."""
    family = {"pissa": "qwen2", "olora": "llama"}[request.param]
    model = save_model(tmp_path_factory.mktemp("decomposed") / "model", family, tokenizer=False, num_hidden_layers=2)
    groups, options = random_groups(8), {"rank": 4, "alpha": 2.0, **KINDS[request.param]}
    reference = oracle.all_logps(oracle.load(model), groups)
    settings = {"r": 4, "lora_alpha": 2.0, "target_modules": "all-linear", **KINDS[request.param]}
    adapted = peft_oracle.new_model(model, init_lora_weights=request.param, **settings)
    loss, _ = oracle.dpo_step(adapted, groups, reference, 0.1)
    ours = Adapted(model, {"init": request.param, **options}, is_reference=True)
    found = [
        pair
        for num_processes, some in WAYS.items()
        for pair in zip(some, run_world(num_processes, outcomes, ours, groups, some, 2)[0], strict=True)
    ]
    return loss, peft_oracle.gradients(adapted), reference, found


def test_the_first_gradients_are_those_of_peft(measured):
    loss, gradients, _, found = measured
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    for case, outcome in found:
        worst, name = oracle.worst_relative_error(outcome.gradients, gradients)
        assert worst <= 1e-5, f"{case}: {name} {worst}"


def test_the_reference_is_what_training_begins_with_which_is_the_model_itself(measured):
    _, _, reference, found = measured
    for case, outcome in found:
        assert len(outcome.margins) >= 4 and not outcome.margins.any(), str(case)
        assert outcome.losses[1] < outcome.losses[0], str(case)
        assert torch.equal(outcome.off, outcome.before), str(case)
        if len(outcome.before) == reference.numel():
            assert float(outcome.before.sum()) == pytest.approx(float(reference.sum()), rel=1e-6), str(case)


def test_weights_after_two_steps_do_not_depend_on_the_way(measured):
    _, _, _, found = measured
    for case, outcome in found[1:]:
        worst, name = oracle.worst_relative_error(outcome.weights, found[0][1].weights)
        assert worst <= 1e-4, f"{case}: {name} {worst}"
