"""Pairs whose two answers travel apart: the numbers of pairs that travel whole, and step-0 margins of zero."""

from __future__ import annotations

import pytest

from megadpo.config.schema import ObjectiveConfig
from megadpo.parallel.layout import Layout
from tests.helpers.models import random_groups, save_model
from tests.helpers.worlds import run_world
from tests.parity.schedule_worker import Apart, Case, apart

pytestmark = pytest.mark.slow

CASES = {
    2: [
        Case(Layout(pipeline=2), moves=True),
        Case(Layout(pipeline=2), share_prompts=False, tokens_per_micro_batch=150),
        Case(Layout(pipeline=2), recompute="full"),
        Case(Layout(pipeline=2), objective=ObjectiveConfig(loss_type="aot", ld_alpha=0.5)),
        Case(Layout(data=2), recompute="selective"),
        Case(Layout(pipeline=2), recompute="small"),
    ],
    4: [
        Case(Layout(pipeline=4)),
        Case(Layout(pipeline=2, tensor=2, sequence=True)),
        Case(Layout(pipeline=2, data=2), overlap=True),
    ],
}
NUM_OFTEN = {2: 5, 4: 2}
"""So many of them each time. Data parallelism beside stages, and cheap results made again, are in tests of whole pairs."""
NUM_GROUPS = 12
"""Four a step: as many micro-batches as the most stages."""


def check(found: list[list[Apart]], cases: list[Case]) -> None:
    for ranks, case in zip(zip(*found, strict=True), cases, strict=True):
        for rank in ranks:
            assert max(rank.worst.values()) <= 1e-5, f"{case}: {rank.worst}"
            assert rank.from_one_stage <= 1e-5, f"{case}: {rank.from_one_stage}"
            assert not rank.first_margins.any(), str(case)
        assert any(len(rank.first_margins) for rank in ranks)


@pytest.mark.parametrize(
    ("size", "num_cases"),
    [*NUM_OFTEN.items(), *(pytest.param(size, len(CASES[size]), marks=pytest.mark.exhaustive) for size in CASES)],
)
def test_answers_that_travel_apart_give_the_gradients_of_whole_pairs(tmp_path, size, num_cases):
    policy = save_model(tmp_path / "policy", num_hidden_layers=size, tie_word_embeddings=True, tokenizer=False)
    cases = CASES[size][:num_cases]
    check(run_world(size, apart, policy, policy, random_groups(NUM_GROUPS, seed=3), cases), cases)


def test_deepspeed_and_experts_too(tmp_path):
    pytest.importorskip("deepspeed")
    groups = random_groups(NUM_GROUPS, seed=3)
    for family, case in (
        ("mistral", Case(Layout(pipeline=2), zero_stage=3)),
        ("mixtral", Case(Layout(pipeline=2), router_aux_coef=0.01)),
    ):
        policy = save_model(tmp_path / family, family, num_hidden_layers=2, tokenizer=False)
        check(run_world(2, apart, policy, policy, groups, [case]), [case])
