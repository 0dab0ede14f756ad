"""The products of all experts of a layer as one operation of autograd (`model.expert_products`).

Megatron's SequentialMLP calls the two linear layers of one expert after the other: for many small experts the calls, and
autograd's nodes, take longer than the products. Here the parameters, and their names in checkpoints, are those of that
MLP; what differs is who multiplies. The tokens of a rank lie expert by expert.

Axes: T tokens, I input and O output columns of an expert's matrix on this rank, E experts of this rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from megadpo.errors import UserError
from megadpo.model.recompute import recomputable
from megadpo.model.weight_gradients import delayed_products

WAYS = ("loop", "grouped", "grouped_mm")
"""What `model.expert_products` may be, beside "auto"."""


def choose_expert_products(requested: str, num_local: int, is_gathered: bool, has_biases: bool = False) -> str:
    """One of WAYS.

    Args:
        requested: as `model.expert_products`.
        num_local: experts of a rank.
        is_gathered: parameters are there only while their own module computes (ZeRO stage 3).
        has_biases: the experts have biases, with which biased.py computes one after the other.

    Raises:
        UserError: it cannot be had with these parameters or this torch.
    """
    if requested == "auto":
        return "loop" if is_gathered or has_biases or num_local == 1 else "grouped"
    reason = None
    if is_gathered and requested != "loop":
        reason = "parallel.zero_stage 3 gathers the matrices of one expert at a time"
    elif has_biases and requested != "loop":
        reason = "experts with biases are multiplied one after the other"
    elif requested == "grouped_mm" and not hasattr(F, "grouped_mm"):
        reason = f"torch {torch.__version__} has no grouped_mm"
    if reason is not None:
        raise UserError(f"model.expert_products is {requested}, but {reason}; set it to auto")
    return requested


class Experts(SequentialMLP):
    """SequentialMLP with the products of its experts joined; it fills the experts slot of a mixture's spec."""

    def __init__(self, *arguments: Any, products: str, scales_inputs: bool = False, **options: Any) -> None:
        """`scales_inputs`: as in `Routing`."""
        super().__init__(*arguments, **options)
        self.products, self.scales_inputs = products, scales_inputs

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """hidden [T, H] in the experts' order, tokens of each [E], probabilities [T] -> what the experts give [T, H]."""
        if self.scales_inputs:
            permuted_local_hidden_states = recomputable(_scaled, permuted_local_hidden_states, permuted_probs)
            permuted_probs = torch.ones_like(permuted_probs)
        if self.products == "loop":
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        counts = tuple(tokens_per_expert.tolist())
        inner = self._linear("linear_fc1", permuted_local_hidden_states, counts)
        inner = self.local_experts[0].activation_func(inner)
        if not self.scales_inputs:
            inner = _scaled(inner, permuted_probs)
        return self._linear("linear_fc2", inner, counts), None

    def _linear(self, name: str, input_TI: Tensor, counts: tuple[int, ...]) -> Tensor:
        layers = [getattr(expert, name) for expert in self.local_experts]
        if any(layer.adapter is not None or layer.four_bit is not None for layer in layers):
            parts = input_TI.split(counts)
            return torch.cat([layer(part)[0] for layer, part in zip(layers, parts, strict=True)])
        weights = [layer.weight for layer in layers]
        output: Tensor = _Products.apply(input_TI, counts, self.products, layers[0].add_weight_gradient, *weights)
        return output


def _scaled(rows_TI: Tensor, factor_T: Tensor) -> Tensor:
    """In the wider of both types, rounded once."""
    return (rows_TI * factor_T.unsqueeze(-1)).to(rows_TI.dtype)


class _Products(torch.autograd.Function):
    """(input [T, I], tokens of each expert, one of WAYS, how weight gradients are added, E weights [O, I]) -> [T, O].

    Weights are kept as they are, not as saved tensors: nothing is moved away or counted with them, and where their
    gradients are kept (`main_grad`) is known. See `weight_gradients._LinearIntoMainGrad`.
    """

    @staticmethod
    def forward(
        ctx: Any, input_TI: Tensor, counts: tuple[int, ...], way: str, add_weight_gradient: Any, *weights: Tensor
    ) -> Tensor:
        ctx.save_for_backward(input_TI)
        ctx.counts, ctx.way, ctx.add_weight_gradient, ctx.weights = counts, way, add_weight_gradient, weights
        return _multiplied(input_TI, [weight.t() for weight in weights], counts, way)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (input_TI,), (gradient_TO,) = ctx.saved_tensors, gradients
        counts, way, weights = ctx.counts, ctx.way, ctx.weights
        input_gradient = None
        if ctx.needs_input_grad[0]:
            input_gradient = _multiplied(gradient_TO, weights, counts, way)
        weight_gradients: Sequence[Tensor | None] = [None] * len(weights)
        if any(ctx.needs_input_grad[4:]):
            inputs, outputs = input_TI.split(counts), gradient_TO.contiguous().split(counts)
            if ctx.add_weight_gradient is not None:
                weight_gradients = _added(ctx.add_weight_gradient, inputs, outputs, weights)
            elif way == "grouped_mm":
                ends = _ends(counts, input_TI.device)
                weight_gradients = F.grouped_mm(gradient_TO.contiguous().t(), input_TI, offs=ends).unbind()
            else:
                weight_gradients = [of_out.t() @ of_in for of_in, of_out in zip(inputs, outputs, strict=True)]
        return (input_gradient, None, None, None, *weight_gradients)


def _multiplied(input_TI: Tensor, matrices: Sequence[Tensor], counts: tuple[int, ...], way: str) -> Tensor:
    """Each expert's rows times its matrix [I, O]: torch's kernel over copies that lie together, or product by product."""
    if way == "grouped_mm":
        product: Tensor = F.grouped_mm(input_TI, torch.stack(list(matrices)), offs=_ends(counts, input_TI.device))
        return product
    output_TO = input_TI.new_empty(len(input_TI), matrices[0].shape[1])
    for rows, matrix, place in zip(input_TI.split(counts), matrices, output_TO.split(counts), strict=True):
        torch.mm(rows, matrix, out=place)
    return output_TO


def _ends(counts: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int32, device=device)


def _added(add: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor], weights: Sequence[Any]) -> list[Tensor | None]:
    """Add each weight's gradient to its `main_grad`, now or delayed; what autograd is handed in its place, which nobody
    reads."""
    stand_ins: list[Tensor | None] = []
    delayed = delayed_products()
    for of_in, of_out, weight in zip(inputs, outputs, weights, strict=True):
        if not weight.requires_grad:
            stand_ins.append(None)
            continue
        if delayed is None:
            add(of_in, of_out, weight.main_grad)
        else:
            delayed.append(_product(add, of_in, of_out, weight.main_grad))
        weight.grad_added_to_main_grad = True
        stand_ins.append(weight.new_zeros(()).expand_as(weight))
    return stand_ins


def _product(add: Any, of_in: Tensor, of_out: Tensor, main_grad: Tensor) -> Any:
    return lambda: add(of_in, of_out, main_grad)
