"""Gradients summed and parameters gathered during computation are the ones that are summed and gathered afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megadpo.config.schema import PipelineScheduleConfig
from megadpo.parallel.layout import Layout
from tests.helpers import oracle
from tests.helpers.marks import all_but_a_few_exhaustive
from tests.helpers.models import random_groups, save_model
from tests.helpers.worlds import run_world
from tests.parity.worker import Case, outcomes

SMALL = 90
OURS = PipelineScheduleConfig("1f1b")
CASES = {
    "2 replicas": ({"tie_word_embeddings": False}, [Case(Layout(data=2), tokens_per_micro_batch=SMALL)]),
    "2 stages x 2 replicas": (
        {"tie_word_embeddings": True},
        [
            Case(Layout(pipeline=2, data=2), tokens_per_micro_batch=SMALL, schedule=OURS),
            Case(Layout(pipeline=2, virtual=2, data=2), tokens_per_micro_batch=SMALL),
        ],
    ),
    "the other schedule of each": (
        {"tie_word_embeddings": True},
        [
            Case(Layout(pipeline=2, data=2), tokens_per_micro_batch=SMALL),
            Case(Layout(pipeline=2, virtual=2, data=2), tokens_per_micro_batch=SMALL, schedule=OURS),
        ],
    ),
    "experts": ({"family": "mixtral"}, [Case(Layout(data=2, expert=2), tokens_per_micro_batch=SMALL)]),
}


@pytest.mark.parametrize("which", all_but_a_few_exhaustive(CASES, slow=(1, 3)))
@pytest.mark.slow
def test_weights_after_three_steps_are_the_same(which, tmp_path):
    changes, cases = CASES[which]
    policy = save_model(tmp_path / "policy", **{"family": "qwen3", **changes}, tokenizer=False)
    reference = save_model(tmp_path / "reference", **{"family": "qwen3", **changes}, seed=1, tokenizer=False)
    both = [replace(case, overlap=overlap) for case in cases for overlap in (False, True)]
    found = run_world(cases[0].layout.world_size, outcomes, policy, reference, random_groups(8, seed=3), both, 3)[0]
    for case, after, overlapped in zip(both[1::2], found[::2], found[1::2], strict=True):
        assert oracle.worst_relative_error(overlapped.gradients, after.gradients)[0] <= 1e-6, str(case)
        worst, name = oracle.worst_relative_error(overlapped.weights, after.weights)
        assert worst <= 1e-6, f"{case}: {name} {worst}"
        assert all(torch.equal(overlapped.model_weights[name], weight) for name, weight in overlapped.weights.items()), str(
            case
        )
