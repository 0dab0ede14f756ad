"""bf16 on a CPU: the same training as fp32 up to bf16's rounding, with master weights and gradients in fp32."""

from __future__ import annotations

import pytest
import torch

from megadpo.parallel.layout import Layout
from tests.helpers.models import random_groups, save_model
from tests.helpers.worlds import run_world
from tests.parity.worker import Case, outcomes

pytestmark = pytest.mark.slow

NUM_STEPS = 4
LAYOUTS = {1: [Layout()], 2: [Layout(tensor=2, sequence=True), Layout(pipeline=2)]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bf16")
    policy, reference = (save_model(directory / str(seed), "qwen3", seed=seed, tokenizer=False) for seed in (0, 1))
    groups = random_groups(9, seed=3)
    found = {}
    for num_processes, layouts in LAYOUTS.items():
        cases = [Case(layout, tokens_per_micro_batch=200) for layout in layouts]
        for dtype in (torch.float32, torch.bfloat16):
            some = run_world(num_processes, outcomes, policy, reference, groups, cases, NUM_STEPS, dtype)[0]
            found |= {(str(layout), dtype): outcome for layout, outcome in zip(layouts, some, strict=True)}
    num_tokens = torch.tensor([len(ids) for group in groups for ids in group.responses])
    layouts = [str(layout) for some in LAYOUTS.values() for layout in some]
    return num_tokens, [(found[layout, torch.float32], found[layout, torch.bfloat16]) for layout in layouts]


def test_the_loss_curve_and_the_gradients_are_those_of_fp32_up_to_rounding(trained):
    _, pairs = trained
    for full, half in pairs:
        assert full.losses[-1] < full.losses[0] / 3, "something is learnt"
        assert half.losses == pytest.approx(full.losses, rel=0.02)
        for name, gradient in full.gradients.items():
            assert float((half.gradients[name] - gradient).norm() / gradient.norm()) < 0.05, name


def test_log_probs_are_within_two_roundings_a_token(trained):
    num_tokens, pairs = trained
    for full, half in pairs:
        assert float(((half.logps - full.logps).abs() / num_tokens).max()) < 2 * torch.finfo(torch.bfloat16).eps


def test_the_model_computes_with_the_rounded_fp32_master_weights(trained):
    for _, half in trained[1]:
        rounded = {name: weights.bfloat16().float() for name, weights in half.weights.items()}
        assert all(torch.equal(half.model_weights[name], weights) for name, weights in rounded.items())
        finer = sum(int((half.weights[name] != weights).sum()) for name, weights in rounded.items())
        assert finer > 0.9 * sum(weights.numel() for weights in rounded.values()), "they keep what bf16 has no place for"
