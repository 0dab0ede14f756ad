"""Weight gradients that products add to main_grad are those that autograd makes and a hook adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from megadpo.config.schema import PipelineScheduleConfig
from megadpo.model.activations import Activations
from megadpo.parallel.layout import Layout
from tests.helpers import oracle
from tests.helpers.models import random_groups, save_model
from tests.helpers.worlds import run_world
from tests.parity.worker import Case, Outcome, outcomes

NUM_LAYERS = 2
SMALL = 90
"""Tokens of a micro-batch, so that there is something to add up."""
LAYOUTS = {
    1: [Layout()],
    2: [Layout(tensor=2, sequence=True), Layout(pipeline=2), Layout(data=2)],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fusion")
    changes = {"num_hidden_layers": NUM_LAYERS, "tie_word_embeddings": True}
    policy = save_model(directory / "policy", "qwen3", tokenizer=False, **changes)
    reference = save_model(directory / "reference", "qwen3", seed=1, tokenizer=False, **changes)
    return policy, reference, random_groups(7, seed=3)


def counted_outcomes(*arguments: Any) -> tuple[list[Outcome] | None, list[int]]:
    """`outcomes` of the arguments, and how many products were added on this rank."""
    from megadpo.model import weight_gradients

    count, add_product = [0], weight_gradients.add_product

    def counted(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        assert total.dtype is torch.float32 and left.shape[1] == right.shape[0]
        count[0] += 1
        add_product(total, left, right)

    weight_gradients.add_product = counted  # type: ignore[assignment]
    return outcomes(*arguments), count


def assert_same(cases: Sequence[Case], found: Sequence[Outcome]) -> None:
    """Of each two cases, one after the other, the second gave what the first did."""
    for case, apart, fused in zip(cases[1::2], found[::2], found[1::2], strict=True):
        worst, name = oracle.worst_relative_error(fused.gradients, apart.gradients)
        assert worst <= 1e-6, f"{case}: {name} {worst}"
        assert fused.loss == apart.loss and fused.grad_norm == pytest.approx(apart.grad_norm, rel=1e-6), str(case)


@pytest.mark.parametrize("num_processes", LAYOUTS)
@pytest.mark.slow
def test_gradients_are_the_same_in_every_layout(files, num_processes, tmp_path):
    away = Activations(offload="disk", offload_dir=tmp_path, offload_window_mib=0)
    ways = [Case(layout, tokens_per_micro_batch=SMALL) for layout in LAYOUTS[num_processes]]
    ways += [replace(ways[-1], overlap=True), replace(ways[-1], overlap=True, memory=away)]
    ways += [replace(ways[num_processes - 1], schedule=PipelineScheduleConfig("1f1b"), recompute="full")]
    cases = [replace(case, fusion=fusion) for case in ways for fusion in (False, True)]
    found, count = run_world(num_processes, counted_outcomes, *files, cases)[0]
    assert_same(cases, found)
    assert count[0] > 0 and count[0] % (4 if num_processes == 1 else 2) == 0, "four a layer"


def test_those_of_experts_too(tmp_path):
    size = {"num_hidden_layers": NUM_LAYERS, "tokenizer": False}
    policy, reference = (save_model(tmp_path / str(seed), "mixtral", seed=seed, **size) for seed in (0, 1))
    cases = [Case(Layout(data=2, expert=2), tokens_per_micro_batch=SMALL, fusion=on) for on in (False, True)]
    assert_same(cases, run_world(2, outcomes, policy, reference, random_groups(7, seed=3), cases)[0])


def test_bf16_products_are_added_in_fp32_no_less_exactly_than_autograd_s():
    from megadpo.model.weight_gradients import add_product

    generator = torch.Generator().manual_seed(0)
    fused, apart = torch.zeros(48, 40), torch.zeros(48, 40)
    exact = torch.zeros(48, 40, dtype=torch.float64)
    for _ in range(6):
        gradient, value = (torch.randn(100, size, generator=generator).bfloat16() for size in (48, 40))
        add_product(fused, gradient.t(), value)
        apart += gradient.t() @ value
        exact += gradient.t().double() @ value.double()
    assert float((fused - exact).norm()) <= float((apart - exact).norm())
