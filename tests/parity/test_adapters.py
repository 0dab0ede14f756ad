"""Adapters compute what PEFT computes on plain transformers, in every layout and engine; off, they are not there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megadpo.config.schema import ObjectiveConfig
from megadpo.parallel.layout import Layout
from tests.helpers import oracle, peft_oracle
from tests.helpers.models import random_groups, save_model
from tests.helpers.worlds import run_world
from tests.parity.adapter_worker import Adapted, Case, outcomes

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    1: [Case()],
    2: [
        Case(Layout(tensor=2)),
        Case(Layout(tensor=2, sequence=True)),
        Case(Layout(pipeline=2)),
        Case(Layout(data=2)),
    ],
}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {"target_modules": ALL}),
}
"""Family, changes to the model, and the adapters' options."""


@pytest.fixture(scope="module", params=list(KINDS))
def measured(request, tmp_path_factory):
    """What PEFT says of a step, and what every case says."""
    family, changes, options = KINDS[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    model = save_model(directory / "model", family, tokenizer=False, num_hidden_layers=2, **changes)
    groups = random_groups(9)
    peft_options = {"r": options.get("rank", 16), "lora_alpha": options.get("alpha", 32.0)}
    peft_options |= {name: value for name, value in options.items() if name not in ("rank", "alpha")}
    adapted = peft_oracle.adapted_model(model, **peft_options)
    with adapted.disable_adapter():
        reference = oracle.all_logps(adapted, groups)
    loss, _ = oracle.dpo_step(adapted, groups, reference, 0.1)
    expected = loss, peft_oracle.gradients(adapted), reference
    found = [
        pair
        for num_processes, cases in CASES.items()
        for pair in zip(
            cases,
            run_world(
                num_processes,
                outcomes,
                Adapted(model, options, peft_oracle.adapter_tensors(adapted)),
                groups,
                cases,
                2,
            )[0],
            strict=True,
        )
    ]
    return expected, found


def test_loss_and_every_gradient_equal_peft(measured):
    (loss, gradients, _), found = measured
    norm = float(torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm())
    for case, outcome in found:
        assert outcome.loss == pytest.approx(loss, rel=1e-6), str(case)
        worst, name = oracle.worst_relative_error(outcome.gradients, gradients)
        assert worst <= 1e-5, f"{case}: {name} {worst}"
        assert outcome.grad_norm == pytest.approx(norm, rel=1e-5), str(case)
