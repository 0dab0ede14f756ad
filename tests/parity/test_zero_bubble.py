"""Weight gradients that are delayed (`schedule.zero_bubble`): the bits of those that are not."""

from __future__ import annotations

import pytest

from megadpo.config.schema import ObjectiveConfig
from megadpo.parallel.layout import Layout
from tests.helpers.models import random_groups, save_model
from tests.helpers.worlds import run_world
from tests.parity.bit_for_bit import check
from tests.parity.schedule_worker import Case, delayed

CASES = {
    2: [
        Case(Layout(pipeline=2), moves=True),
        Case(Layout(pipeline=2), recompute="full", objective=ObjectiveConfig(loss_type="aot", ld_alpha=0.5)),
        Case(Layout(pipeline=2), recompute="small"),
    ],
    4: [
        Case(Layout(pipeline=4)),
        Case(Layout(pipeline=2, tensor=2, sequence=True), recompute="selective"),
        Case(Layout(pipeline=2, data=2), overlap=True),
        Case(Layout(pipeline=2, context=2, context_method="allgather")),
    ],
}
NUM_GROUPS = 18
"""Four a step: as many micro-batches as the most stages."""


@pytest.mark.parametrize(
    ("size", "num_cases"), [(4, 3), *(pytest.param(*some, marks=pytest.mark.exhaustive) for some in ((4, 4), (2, 3)))]
)
@pytest.mark.slow
def test_gradients_are_those_of_1f1b_bit_for_bit(tmp_path, size, num_cases):
    """Context parallelism beside stages is in test_context_parallel.py without it."""
    policy = save_model(tmp_path / "policy", num_hidden_layers=size, tie_word_embeddings=True, tokenizer=False)
    cases = CASES[size][:num_cases]
    check(run_world(size, delayed, policy, policy, random_groups(NUM_GROUPS, seed=3), cases), cases)


@pytest.mark.slow
def test_experts_and_biases_too(tmp_path):
    for family, case in (
        ("mixtral", Case(Layout(pipeline=2), router_aux_coef=0.01)),
        ("qwen2", Case(Layout(pipeline=2))),
    ):
        policy = save_model(tmp_path / family, family, num_hidden_layers=2, tokenizer=False)
        check(run_world(2, delayed, policy, policy, random_groups(NUM_GROUPS, seed=3), [case]), [case])


@pytest.mark.slow
def test_bf16_too(tmp_path):
    case = Case(Layout(pipeline=2), dtype=pytest.importorskip("torch").bfloat16)
    policy = save_model(tmp_path / "policy", num_hidden_layers=2, tokenizer=False)
    check(run_world(2, delayed, policy, policy, random_groups(NUM_GROUPS, seed=3), [case]), [case])
