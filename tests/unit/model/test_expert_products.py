"""All experts of a layer in one operation: outputs and gradients by the formula, whoever adds them up, and who multiplies."""

from __future__ import annotations

import contextlib

import pytest
import torch

from megadpo.errors import UserError
from megadpo.model.moe.products import _Products, choose_expert_products
from megadpo.model.weight_gradients import _add_by_torch, delay_products

COUNTS = (3, 0, 5, 1)
"""Tokens of each expert; one has none."""


def operands(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Input [T, I], a weight [O, I] for each expert, and the output's gradient [T, O]."""
    torch.manual_seed(0)
    input_TI = torch.randn(sum(COUNTS), 8, dtype=dtype).requires_grad_()
    weights = [torch.randn(4, 8, dtype=dtype).requires_grad_() for _ in COUNTS]
    return input_TI, weights, torch.randn(sum(COUNTS), 4, dtype=dtype)


def by_the_formula() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    input_TI, weights, gradient_TO = operands()
    weight_of_token = torch.stack(weights).repeat_interleave(torch.tensor(COUNTS), dim=0)
    output_TO = torch.einsum("toi,ti->to", weight_of_token, input_TI)
    output_TO.backward(gradient_TO)
    assert input_TI.grad is not None
    return output_TO.detach(), input_TI.grad, [weight.grad for weight in weights if weight.grad is not None]


@pytest.mark.parametrize(
    ("way", "dtype", "tolerance"),
    [("grouped", torch.float64, 1e-12), ("grouped", torch.float32, 1e-5), ("grouped_mm", torch.float32, 1e-5)],
)
def test_outputs_and_gradients_are_those_of_the_formula(way: str, dtype: torch.dtype, tolerance: float) -> None:
    output, input_gradient, weight_gradients = by_the_formula()
    input_TI, weights, gradient_TO = operands()
    input_TI = input_TI.detach().to(dtype).requires_grad_()
    weights = [weight.detach().to(dtype).requires_grad_() for weight in weights]
    found = _Products.apply(input_TI, COUNTS, way, None, *weights)
    found.backward(gradient_TO.to(dtype))
    assert not weight_gradients[1].any(), "the expert without tokens"
    for ours, theirs in zip(
        [found.detach(), input_TI.grad, *(weight.grad for weight in weights)],
        [output, input_gradient, *weight_gradients],
        strict=True,
    ):
        assert ours is not None and (ours.double() - theirs).norm() <= tolerance * max(1.0, float(theirs.norm()))


@pytest.mark.parametrize("is_delayed", [False, True])
def test_weight_gradients_are_added_to_where_the_engine_keeps_them_now_or_later(is_delayed: bool) -> None:
    _, _, expected = by_the_formula()
    input_TI, weights, gradient_TO = operands()
    weights[2].requires_grad_(False)
    for weight in weights:
        weight.main_grad = torch.ones_like(weight)  # type: ignore[attr-defined]
    output = _Products.apply(input_TI, COUNTS, "grouped", _add_by_torch, *weights)
    with delay_products() if is_delayed else contextlib.nullcontext() as delayed:
        output.backward(gradient_TO)
    if delayed is not None:
        assert all(torch.equal(weight.main_grad, torch.ones_like(weight)) for weight in weights)  # type: ignore[attr-defined]
        delayed.add_up()
    for number, (weight, gradient) in enumerate(zip(weights, expected, strict=True)):
        added = weight.main_grad - 1  # type: ignore[attr-defined]
        assert torch.allclose(added, torch.zeros_like(gradient) if number == 2 else gradient, atol=1e-12)
        assert hasattr(weight, "grad_added_to_main_grad") == (number != 2)


def test_auto_is_grouped_where_the_matrices_are_there_together() -> None:
    assert choose_expert_products("auto", 4, is_gathered=False) == "grouped"
    assert choose_expert_products("auto", 1, is_gathered=False) == choose_expert_products("auto", 4, True) == "loop"
    assert choose_expert_products("loop", 4, is_gathered=True) == "loop"
    assert choose_expert_products("auto", 4, is_gathered=False, has_biases=True) == "loop"
    with pytest.raises(
        UserError, match=r"model\.expert_products is grouped, but experts with biases are multiplied one after"
    ):
        choose_expert_products("grouped", 4, is_gathered=False, has_biases=True)
    with pytest.raises(
        UserError, match=r"model.expert_products is grouped, but parallel.zero_stage 3 gathers .*; set it to"
    ):
        choose_expert_products("grouped", 4, is_gathered=True)
