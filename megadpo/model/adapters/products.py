"""The products of a linear layer with adapters, W x + scaling B A x, as one autograd operation: column- and row-parallel.

Tensor parallelism follows the layer. Column-parallel: A is whole on every rank, B is cut by rows as W is. Row-parallel: A
is cut by columns as W is, B is whole. What is summed over ranks is as narrow as the rank of the adapters. Under sequence
parallelism the matrix that is whole sees this rank's tokens only, so that its gradient is summed over the tensor ranks at
the end of the step, as those of norms are (the attribute `sequence_parallel`). Experts have no sums on the way: their
dispatcher does them for hidden states, and what several ranks hold of an expert's adapter has its gradient summed here.

W is frozen: there is no product for its gradient, and x is kept for A's alone. In 4 bits W is made anew where it is read.

Axes: T tokens of the layer's stream, t of this rank's part under sequence parallelism, I inputs and O outputs of the layer
on this rank, R the ranks of its adapters added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megadpo.model.four_bit.weight import FourBitWeight
from megadpo.model.layer_ranks import LayerRanks, gather_buffer, rows, wait


class LowProducts(Protocol):
    """The products with B of all projections of a layer (`adapters.linear.LinearAdapter`)."""

    dropout: float

    def add_outputs(self, output_TO: Tensor, low_TR: Tensor, bs: Sequence[Tensor]) -> None: ...

    def low_gradient_TR(self, gradient_TO: Tensor, bs: Sequence[Tensor]) -> Tensor: ...

    def b_gradients(self, gradient_TO: Tensor, low_TR: Tensor) -> list[Tensor]: ...


@dataclass(frozen=True)
class Operands:
    """What the operations take besides tensors.

    Attributes:
        four_bit: the weight, where it is no tensor.
    """

    adapter: LowProducts
    ranks: LayerRanks
    four_bit: FourBitWeight | None

    def dense(self, weight_OI: Tensor | None) -> Tensor:
        """The weight, which is given where it is not in 4 bits."""
        if weight_OI is None:
            assert self.four_bit is not None
            return self.four_bit.dense()
        return weight_OI

    def dropped(self, input_TI: Tensor, kept_TI: Tensor | None) -> Tensor:
        """What dropout makes of the adapters' input, or of its gradient."""
        return input_TI if kept_TI is None else input_TI * kept_TI / (1 - self.adapter.dropout)


class ColumnParallel(torch.autograd.Function):
    """(hidden, W, bias, A, kept, operands, *B) -> the layer's output with its adapters'."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight_OI: Tensor | None,
        bias_O: Tensor | None,
        a_RI: Tensor,
        kept: Tensor | None,
        operands: Operands,
        *bs: Tensor,
    ) -> Tensor:
        input_tI, ranks, dense_OI = rows(hidden), operands.ranks, operands.dense(weight_OI)
        output_TO = ranks.gathered(input_tI, gather_buffer(hidden)) @ dense_OI.t()
        if bias_O is not None:
            output_TO += bias_O
        low_TR = ranks.gathered(operands.dropped(input_tI, _flat(kept)) @ a_RI.t())
        operands.adapter.add_outputs(output_TO, low_TR, bs)
        ctx.save_for_backward(hidden, weight_OI, a_RI, kept, low_TR, *bs)
        ctx.operands = operands
        return output_TO.view(-1, *hidden.shape[1:-1], len(dense_OI))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight_OI, a_RI, kept, low_TR, *bs = ctx.saved_tensors
        operands, ranks, gradient_TO = ctx.operands, ctx.operands.ranks, rows(gradients[0])
        low_gradient_TR = operands.adapter.low_gradient_TR(gradient_TO, bs)
        low_gradient_tR, low_sum = ranks.reduced(low_gradient_TR)
        input_gradient, input_sum = None, None
        if ctx.needs_input_grad[0]:
            input_gradient, input_sum = ranks.reduced(gradient_TO @ operands.dense(weight_OI))
        b_gradients = operands.adapter.b_gradients(gradient_TO, low_TR)
        wait(low_sum)
        dropped_tI = operands.dropped(rows(hidden), _flat(kept))
        a_gradient = ranks.summed_for_parameter(low_gradient_tR).t() @ dropped_tI
        wait(input_sum)
        if input_gradient is not None:
            _add_low(input_gradient, low_gradient_tR, a_RI, operands, _flat(kept))
            input_gradient = input_gradient.view(hidden.shape)
        return input_gradient, None, None, a_gradient, None, None, *b_gradients


class RowParallel(torch.autograd.Function):
    """(hidden, W, None, A, kept, operands, *B) -> the layer's output with its adapters', before its bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight_OI: Tensor | None,
        bias_O: None,
        a_RI: Tensor,
        kept: Tensor | None,
        operands: Operands,
        *bs: Tensor,
    ) -> Tensor:
        input_TI, ranks, dense_OI = rows(hidden), operands.ranks, operands.dense(weight_OI)
        output_tO, output_sum = ranks.reduced(input_TI @ dense_OI.t())
        low_tR, low_sum = ranks.reduced(operands.dropped(input_TI, _flat(kept)) @ a_RI.t())
        wait(output_sum)
        wait(low_sum)
        operands.adapter.add_outputs(output_tO, low_tR, bs)
        ctx.save_for_backward(hidden, weight_OI, a_RI, kept, low_tR, *bs)
        ctx.operands = operands
        return output_tO.view(-1, *hidden.shape[1:-1], len(dense_OI))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight_OI, a_RI, kept, low_tR, *bs = ctx.saved_tensors
        operands, ranks, gradient_tO = ctx.operands, ctx.operands.ranks, rows(gradients[0])
        gradient_TO = ranks.gathered(gradient_tO, gather_buffer(gradients[0]))
        low_gradient_TR = operands.adapter.low_gradient_TR(gradient_TO, bs)
        b_gradients = operands.adapter.b_gradients(gradient_tO, ranks.summed_for_parameter(low_tR))
        a_gradient = low_gradient_TR.t() @ operands.dropped(rows(hidden), _flat(kept))
        input_gradient = None
        if ctx.needs_input_grad[0]:
            input_gradient = gradient_TO @ operands.dense(weight_OI)
            _add_low(input_gradient, low_gradient_TR, a_RI, operands, _flat(kept))
            input_gradient = input_gradient.view(hidden.shape)
        return input_gradient, None, None, a_gradient, None, None, *b_gradients


def _add_low(
    input_gradient_TI: Tensor, low_gradient_TR: Tensor, a_RI: Tensor, operands: Operands, kept_TI: Tensor | None
) -> None:
    """Add what the adapters' input gets to what the layer's own gets."""
    if kept_TI is None:
        input_gradient_TI.addmm_(low_gradient_TR, a_RI)
    else:
        input_gradient_TI += operands.dropped(low_gradient_TR @ a_RI, kept_TI)


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.flatten(0, -2)
