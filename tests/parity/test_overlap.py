"""Gradients summed and parameters gathered beside computing are the ones that are summed and gathered afterwards."""

from __future__ import annotations

import pytest
import torch

from megadpo.parallel.layout import Layout
from tests.models import random_groups, save_model
from tests.parity import oracle
from tests.parity.worker import Case, outcomes
from tests.worlds import run_world

SMALL = 90
LAYOUTS = {
    2: ("qwen3", [Layout(data=2)]),
    4: ("qwen3", [Layout(pipeline=2, data=2), Layout(pipeline=2, virtual=2, data=2)]),
    "experts": ("mixtral", [Layout(data=2, expert=2)]),
}


@pytest.mark.parametrize("which", LAYOUTS)
def test_weights_after_three_steps_are_the_same_to_the_bit(which, tmp_path):
    family, layouts = LAYOUTS[which]
    policy = save_model(tmp_path / "policy", family, tokenizer=False, tie_word_embeddings=True)
    reference = save_model(tmp_path / "reference", family, seed=1, tokenizer=False, tie_word_embeddings=True)
    groups = random_groups(11, seed=3)
    cases = [Case(x, tokens_per_micro_batch=SMALL, overlap=overlap) for x in layouts for overlap in (False, True)]
    found = run_world(layouts[0].world_size, outcomes, policy, reference, groups, cases, 3)[0]
    for after, beside in zip(found[::2], found[1::2], strict=True):
        assert oracle.worst_relative_error(beside.gradients, after.gradients)[0] <= 1e-6
        assert oracle.worst_relative_error(beside.weights, after.weights)[0] <= 1e-6
        assert all(torch.equal(beside.model_weights[name], weight) for name, weight in beside.weights.items())
