"""The same for DeepSpeed's engine and for mixtures of experts."""

from __future__ import annotations

import pytest

from megadpo.parallel.layout import Layout
from tests.helpers.models import random_groups, save_model
from tests.helpers.worlds import run_world
from tests.parity.bit_for_bit import check
from tests.parity.schedule_worker import Case, compared

pytestmark = pytest.mark.slow

ZERO = {
    2: [Case(Layout(pipeline=2), zero_stage, moves=zero_stage == 1) for zero_stage in (1, 3, 2, 0)],
    4: [
        Case(Layout(pipeline=4), 1),
        Case(Layout(pipeline=2, data=2), 3),
        Case(Layout(pipeline=2, tensor=2, sequence=True), 2),
    ],
}


NUM_GROUPS = 18


@pytest.mark.parametrize(
    ("size", "num_cases"), [(2, 2), *(pytest.param(size, 4, marks=pytest.mark.exhaustive) for size in ZERO)]
)
def test_deepspeed_gives_the_same_bits_under_either_schedule(tmp_path, size, num_cases):
    """Each time with parameters that are whole and with sharded ones."""
    pytest.importorskip("deepspeed")
    cases = ZERO[size][:num_cases]
    policy = save_model(tmp_path / "policy", num_hidden_layers=size, tie_word_embeddings=True, tokenizer=False)
    check(run_world(size, compared, policy, policy, random_groups(NUM_GROUPS, seed=3), cases), cases)


EXPERTS = {
    2: [Case(Layout(pipeline=2), router_aux_coef=0.01)],
    4: [Case(Layout(pipeline=2, data=2, expert=2), router_aux_coef=0.01)],
}


@pytest.mark.parametrize("size", [4, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_experts_and_their_balancing_loss_too(tmp_path, size):
    policy = save_model(tmp_path / "policy", "mixtral", num_hidden_layers=2, tokenizer=False)
    check(run_world(size, compared, policy, policy, random_groups(NUM_GROUPS, seed=3), EXPERTS[size]), EXPERTS[size])
