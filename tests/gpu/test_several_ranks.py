"""Two ranks on one card, over gloo: the gradients and weights of one rank, in every kind of parallelism."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megadpo.config.schema import ModelConfig, PipelineScheduleConfig
from megadpo.parallel.layout import Layout
from tests.gpu.machine import on
from tests.gpu.staged_gloo import outcomes_over_gloo
from tests.helpers import oracle
from tests.helpers.models import random_groups, save_model
from tests.parity.worker import Case, outcomes

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.xdist_group("several ranks"),  # the second rank's process is started once
]

SDPA = ModelConfig(attention="sdpa")
"""Compiles nothing: in these small models there would be more to wait for than to compute."""

TWO_RANKS = {
    "tensor": Case(Layout(tensor=2), model=SDPA),
    "tensor and sequence": Case(Layout(tensor=2, sequence=True), model=SDPA),
    "pipeline": Case(Layout(pipeline=2), model=SDPA, tokens_per_micro_batch=200),
    "pipeline, own schedule": Case(
        Layout(pipeline=2), model=SDPA, tokens_per_micro_batch=200, schedule=PipelineScheduleConfig(name="1f1b")
    ),
    "context, ulysses": Case(Layout(context=2, context_method="ulysses"), model=SDPA),
    "context, allgather": Case(Layout(context=2, context_method="allgather"), model=SDPA),
    "data": Case(Layout(data=2), model=SDPA, tokens_per_micro_batch=200, overlap=False),
    "data, overlapped": Case(Layout(data=2), model=SDPA, tokens_per_micro_batch=200, overlap=True),
    "data, moments on the host": Case(Layout(data=2), model=SDPA, tokens_per_micro_batch=200, offload="cpu"),
}
NUM_STEPS = 3


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path, list]:
    directory = tmp_path_factory.mktemp("ranks")
    changes = {"num_hidden_layers": 2, "num_key_value_heads": 2, "tie_word_embeddings": True, "tokenizer": False}
    policy, reference = (save_model(directory / str(seed), "qwen3", seed=seed, **changes) for seed in (0, 1))
    return policy, reference, random_groups(13, seed=3)


@pytest.fixture(scope="module")
def alone(files):
    return on("cuda", outcomes, *files, [Case(Layout(), model=SDPA)], NUM_STEPS)[0]


@pytest.mark.parametrize("case", TWO_RANKS.values(), ids=list(TWO_RANKS))
def test_two_ranks_on_the_card_give_the_gradients_and_weights_of_one(files, alone, case):
    (found,) = on("cuda", outcomes_over_gloo, *files, [case], NUM_STEPS, num_ranks=2, timeout=60)
    worst, name = oracle.worst_relative_error(found.gradients, alone.gradients)
    assert worst <= 1e-5, f"{name} {worst}"
    assert found.losses == pytest.approx(alone.losses, rel=1e-4)
    before = {name: tensor.detach() for name, tensor in oracle.load(files[0]).named_parameters()}
    apart = torch.stack([(found.weights[name] - alone.weights[name]).norm() for name in before]).norm()
    moved = torch.stack([(alone.weights[name] - before[name]).norm() for name in before]).norm()
    assert float(apart / moved) <= 1e-3


def test_in_bf16_margins_are_exactly_zero_at_step_0_on_two_ranks(files):
    policy, _, groups = files
    cases = [Case(layout, model=SDPA) for layout in (Layout(tensor=2, sequence=True), Layout(pipeline=2), Layout(data=2))]
    found = on("cuda", outcomes_over_gloo, policy, policy, groups, cases, 0, torch.bfloat16, num_ranks=2, timeout=60)
    for case, outcome in zip(cases, found, strict=True):
        assert len(outcome.margins) >= len(groups) and not outcome.margins.any(), str(case)
