"""Megatron's linear layers with weights in 4 bits, which are made dense where they are read and never kept.

A layer with an adapter computes by adapters/products.py; the operations here are those of a layer without one, or with it
turned off, and do the same sums in the same order.

Axes: T tokens of the layer's stream, t of this rank's part under sequence parallelism, I inputs and O outputs of the layer
on this rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megadpo.model.four_bit.weight import FourBit, FourBitWeight
from megadpo.model.layer_ranks import LayerRanks, gather_buffer, rows, wait
from megadpo.model.weight_gradients import ColumnLinear, RowLinear
from megadpo.platform.device import compute_device


class _FourBitLinear:
    """A linear layer whose `weight` is a parameter without memory, until `without_parameters`, and none from then on."""

    four_bit: Any  # a FourBitWeight
    weight: torch.nn.Parameter
    _operation: type[torch.autograd.Function]

    def __init__(self, *arguments: Any, quantization: FourBit, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Megatron takes memory for it, which goes at once: one layer's at a time.
        made: torch.nn.Parameter = self.weight
        self.four_bit = FourBitWeight(quantization, made.dtype, compute_device())
        self.weight = torch.nn.Parameter(torch.empty_like(made, device="meta"), requires_grad=False)
        self.weight.__dict__.update(made.__dict__, four_bit=self.four_bit)

    def dense_weight(self) -> Tensor:
        dense: Tensor = self.four_bit.dense()
        return dense

    def base_output(self, input_: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        layer: Any = self
        bias = None if layer.skip_bias_add else layer.bias
        output = self._operation.apply(input_, bias, self.four_bit, LayerRanks.of(layer))
        return output, layer.bias if layer.skip_bias_add else None


class _ColumnOperation(torch.autograd.Function):
    """(hidden, bias, weight, ranks) -> the layer's output."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, bias_O: Tensor | None, weight: FourBitWeight, ranks: LayerRanks) -> Tensor:
        weight_OI = weight.dense()
        output_TO = ranks.gathered(rows(hidden), gather_buffer(hidden)) @ weight_OI.t()
        if bias_O is not None:
            output_TO += bias_O
        ctx.weight, ctx.ranks, ctx.shape = weight, ranks, hidden.shape
        return output_TO.view(-1, *hidden.shape[1:-1], len(weight_OI))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input_gradient, input_sum = ctx.ranks.reduced(rows(gradients[0]) @ ctx.weight.dense())
        wait(input_sum)
        return input_gradient.view(ctx.shape), None, None, None


class _RowOperation(torch.autograd.Function):
    """(hidden, bias, weight, ranks) -> the layer's output."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, bias_O: Tensor | None, weight: FourBitWeight, ranks: LayerRanks) -> Tensor:
        weight_OI = weight.dense()
        output_tO, output_sum = ranks.reduced(rows(hidden) @ weight_OI.t())
        wait(output_sum)
        if bias_O is not None:
            output_tO += bias_O
        ctx.weight, ctx.ranks, ctx.shape = weight, ranks, hidden.shape
        return output_tO.view(-1, *hidden.shape[1:-1], len(weight_OI))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient_TO = ctx.ranks.gathered(rows(gradients[0]), gather_buffer(gradients[0]))
        return (gradient_TO @ ctx.weight.dense()).view(ctx.shape), None, None, None


class FourBitColumnLinear(_FourBitLinear, ColumnLinear):
    """Its output columns are split over the tensor ranks."""

    _operation = _ColumnOperation


class FourBitRowLinear(_FourBitLinear, RowLinear):
    """Its input columns are split over the tensor ranks."""

    _operation = _RowOperation


def use_four_bit_layers(submodules: Iterable[Any], quantization: FourBit) -> None:
    """Put the layers of this file into the place of those of weight_gradients.py in submodules of a Megatron spec."""
    kinds = {ColumnLinear: FourBitColumnLinear, RowLinear: FourBitRowLinear}
    for each in submodules:
        for name, module in vars(each).items():
            kind, params = (module.module, module.params) if isinstance(module, ModuleSpec) else (module, {})
            if kind in kinds:
                setattr(each, name, ModuleSpec(module=kinds[kind], params={**params, "quantization": quantization}))


def without_parameters(model: torch.nn.Module) -> None:
    """Take the weights without memory out of a model that is built: engines look at all parameters that there are."""
    for module in _layers(model):
        del module._parameters["weight"]


def bytes_in_four_bits(models: Iterable[torch.nn.Module]) -> int:
    """Bytes of the weights in 4 bits of models, scales included."""
    return sum(module.four_bit.num_bytes for model in models for module in _layers(model))


def _layers(model: torch.nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, FourBitColumnLinear | FourBitRowLinear))
