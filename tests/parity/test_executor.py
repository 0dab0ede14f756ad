"""Our schedules on real models: the same bits as Megatron's, also with the reference's forwards among the policy's."""

from __future__ import annotations

import pytest

from megadpo.config.schema import ObjectiveConfig
from megadpo.parallel.layout import Layout
from tests.helpers.models import random_groups, save_model
from tests.helpers.worlds import run_world
from tests.parity.bit_for_bit import check
from tests.parity.schedule_worker import Case, compared

PIPELINE_2 = [
    Case(Layout(pipeline=2), moves=True),
    Case(Layout(pipeline=2), tokens_per_micro_batch=2000, recompute="full"),
    Case(Layout(pipeline=2, virtual=2)),
    Case(Layout(pipeline=2), objective=ObjectiveConfig(loss_type="aot", ld_alpha=0.5)),
    Case(Layout(pipeline=2), objective=ObjectiveConfig(loss_type=["sigmoid", "bco_pair"], bco_running_delta=True)),
]
PIPELINE_4 = [Case(Layout(pipeline=4, virtual=2))]
MOVES_IN_4 = [Case(Layout(pipeline=4), moves=True)]
"""Four stages are in PIPELINE_4 and in test_zero_bubble.py, a reference that moves in PIPELINE_2."""
NUM_GROUPS = 12
"""Four a step: as many micro-batches as the most stages."""
PIPELINE_2_OF_2 = [
    Case(Layout(pipeline=2, tensor=2, sequence=True)),
    Case(Layout(pipeline=2, data=2), overlap=True),
    Case(Layout(pipeline=2, virtual=2, data=2), overlap=True),
    Case(Layout(pipeline=2, context=2, context_method="allgather")),
    Case(Layout(pipeline=2, virtual=2, context=2, context_method="ulysses")),
]


@pytest.mark.parametrize(
    ("size", "num_layers", "cases"),
    [
        (2, 4, PIPELINE_2),
        (4, 8, PIPELINE_4),
        *(pytest.param(4, 4, cases, marks=pytest.mark.exhaustive) for cases in (MOVES_IN_4, PIPELINE_2_OF_2)),
    ],
    ids=["two stages", "four stages of two chunks", "four stages", "two stages and more"],
)
@pytest.mark.slow
def test_gradients_are_those_of_megatrons_schedule_bit_for_bit(tmp_path, size, num_layers, cases):
    policy = save_model(tmp_path / "policy", num_hidden_layers=num_layers, tie_word_embeddings=True, tokenizer=False)
    groups = random_groups(NUM_GROUPS, seed=3)
    check(run_world(size, compared, policy, policy, groups, cases), cases)
