"""Adapters beside Megatron's tensor-parallel linear layers: W x + scaling B A x, one autograd operation a layer.

A Megatron layer may be several Hugging Face projections in one (queries, keys and values; gate and up). Each has an adapter
of its own; here their A are stacked to one matrix, which reads x once, and the products with their B are added to the
layer's own output as they are computed. W is frozen: there is no product for its gradient, and x is kept for A's alone.

Tensor parallelism follows the layer. Column-parallel: A is whole on every rank, B is cut by rows as W is. Row-parallel: A
is cut by columns as W is, B is whole. What is summed over ranks is as narrow as the rank of the adapters. Under sequence
parallelism the matrix that is whole sees this rank's tokens only, so that its gradient is summed over the tensor ranks at
the end of the step, as those of norms are (the attribute `sequence_parallel`). Experts have no sums on the way: their
dispatcher does them for hidden states, and what several ranks hold of an expert's adapter has its gradient summed here.

Axes: T tokens of the layer's stream, t of this rank's part under sequence parallelism, I inputs and O outputs of the layer
on this rank, R the ranks of its adapters added up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

MOST_RUNS = {"cpu": 128}
"""Of rows of one projection after the other (queries, keys and values come by groups of heads): up to so many have a product
each; more, and all B of the layer are multiplied as one matrix of blocks, which is less work for a GPU to begin."""

MOST_RUNS_ELSEWHERE = 4

POLICY, REFERENCE, OFF = "policy", "reference", "off"
"""What computes: the adapters that are trained, a second set that is frozen, or the model without any."""


@dataclass
class AdapterSwitch:
    """Which adapters the layers of a stage compute with; one for all of them.

    Attributes:
        state: POLICY, REFERENCE or OFF.
        originals: parameters that are trained whole, each with the values that it has where the adapters are off.
        drops: inputs are dropped: in passes whose gradients are learned from, recomputed ones included.
    """

    state: str = POLICY
    drops: bool = False
    originals: list[tuple[torch.nn.Parameter, Tensor]] = field(default_factory=list)

    @contextlib.contextmanager
    def turned(self, state: str) -> Iterator[None]:
        """Within the block the layers compute with those adapters."""
        before, self.state = self.state, state
        self._exchange(before, state)
        try:
            yield
        finally:
            self._exchange(state, before)
            self.state = before

    def _exchange(self, before: str, after: str) -> None:
        if (before == POLICY) == (after == POLICY):
            return
        for number, (parameter, other) in enumerate(self.originals):
            self.originals[number] = parameter, parameter.data
            parameter.data = other


@dataclass(frozen=True)
class Projection:
    """One Hugging Face linear layer in a Megatron layer.

    Attributes:
        module: its full name.
        rank, scaling: of its adapter.
        first: the first of its columns among the layer's R.
        rows: (start, length) of its rows among the layer's O on this rank.
    """

    module: str
    rank: int
    scaling: float
    first: int
    rows: tuple[tuple[int, int], ...]

    @property
    def short_name(self) -> str:
        return self.module.rpartition(".")[2]

    @property
    def columns(self) -> slice:
        return slice(self.first, self.first + self.rank)

    @property
    def runs(self) -> Iterator[tuple[slice, slice]]:
        """Its rows among the layer's, and where they are among its own."""
        done = 0
        for start, length in self.rows:
            yield slice(start, start + length), slice(done, done + length)
            done += length


class LinearAdapter:
    """The adapters of one layer, whose parameters (or buffers) they are: `lora_A` [R, I], for each projection
    `lora_B_q_proj` [its rows, rank] and, of DoRA, `magnitude_q_proj` [its rows], behind `prefix`."""

    def __init__(
        self,
        projections: Sequence[Projection],
        is_row_parallel: bool,
        dropout: float = 0.0,
        use_dora: bool = False,
        prefix: str = "",
    ) -> None:
        self.projections, self.is_row_parallel = tuple(projections), is_row_parallel
        self.dropout, self.use_dora, self.prefix = dropout, use_dora, prefix
        self._squares_O: Tensor | None = None
        self._rows: dict[torch.device, list[Tensor]] = {}

    def output(self, layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the layer's forward gives, adapters added: hidden [T or t, 1, I] -> ([t or T, 1, O], bias or None)."""
        bias = None if layer.skip_bias_add else layer.bias
        operation = _RowParallel if self.is_row_parallel else _ColumnParallel
        operands = _Operands.of(layer, self)
        output = operation.apply(
            hidden,
            layer.weight,
            None if self.use_dora or self.is_row_parallel else bias,
            self._tensor(layer, "lora_A"),
            self._kept_inputs(layer, hidden, operands),
            operands,
            *(self._tensor(layer, f"lora_B_{each.short_name}") for each in self.projections),
        )
        if self.use_dora:
            output = (output * self._magnitudes_over_norms_O(layer, operands)).to(output.dtype)
        if bias is not None and (self.use_dora or self.is_row_parallel):
            output = output + bias
        return output, layer.bias if layer.skip_bias_add else None

    def _tensor(self, layer: Any, name: str) -> Tensor:
        return getattr(layer, self.prefix + name)

    def _has_few_runs(self, device: torch.device) -> bool:
        """Whether a product for each run of rows is cheaper than one with blocks of zeros."""
        return sum(len(each.rows) for each in self.projections) <= MOST_RUNS.get(device.type, MOST_RUNS_ELSEWHERE)

    def add_outputs(self, output_TO: Tensor, low_TR: Tensor, bs: Sequence[Tensor]) -> None:
        """Add scaling B A x to the layer's output, in the products themselves."""
        if not self._has_few_runs(output_TO.device):
            output_TO.addmm_(low_TR, self.stacked_OR(bs, output_TO.shape[1]).t())
            return
        for each, b in zip(self.projections, bs, strict=True):
            for outputs, own in each.runs:
                output_TO[:, outputs].addmm_(low_TR[:, each.columns], b[own].t(), alpha=each.scaling)

    def low_gradient_TR(self, gradient_TO: Tensor, bs: Sequence[Tensor]) -> Tensor:
        """The gradient of A x."""
        if not self._has_few_runs(gradient_TO.device):
            return gradient_TO @ self.stacked_OR(bs, gradient_TO.shape[1])
        low_TR = gradient_TO.new_empty((len(gradient_TO), sum(each.rank for each in self.projections)))
        for each, b in zip(self.projections, bs, strict=True):
            for number, (outputs, own) in enumerate(each.runs):
                beta = 1 if number else 0
                low_TR[:, each.columns].addmm_(gradient_TO[:, outputs], b[own], beta=beta, alpha=each.scaling)
        return low_TR

    def b_gradients(self, gradient_TO: Tensor, low_TR: Tensor) -> list[Tensor]:
        """The gradient of each B."""
        if not self._has_few_runs(gradient_TO.device):
            gradient_OR = gradient_TO.t() @ low_TR
            return [
                gradient_OR[rows, each.columns] * each.scaling
                for each, rows in zip(self.projections, self.rows(gradient_TO.device), strict=True)
            ]
        # The transposed product is the faster one on a CPU.
        return [
            torch.cat([(low_TR[:, each.columns].t() @ gradient_TO[:, outputs]).t() for outputs, _ in each.runs])
            * each.scaling
            for each in self.projections
        ]

    def stacked_OR(self, bs: Sequence[Tensor], num_rows: int) -> Tensor:
        """Each B times its scaling, in its rows and columns; zeros elsewhere."""
        stacked = bs[0].new_zeros((num_rows, sum(each.rank for each in self.projections)))
        for each, rows, b in zip(self.projections, self.rows(bs[0].device), bs, strict=True):
            stacked[rows, each.columns] = b * each.scaling
        return stacked

    def rows(self, device: torch.device) -> list[Tensor]:
        """The numbers of each projection's rows."""
        if device not in self._rows:
            self._rows[device] = [
                torch.cat([torch.arange(start, start + length, device=device) for start, length in each.rows])
                for each in self.projections
            ]
        return self._rows[device]

    def _kept_inputs(self, layer: Any, hidden: Tensor, operands: _Operands) -> Tensor | None:
        """Which inputs dropout leaves, [t, 1, I]; None without. Ranks with parts of the inputs draw for themselves."""
        if not self.dropout or not layer.adapter_switch.drops:
            return None
        has_part = self.is_row_parallel or operands.is_sequence_parallel
        with get_cuda_rng_tracker().fork() if has_part and operands.group is not None else contextlib.nullcontext():
            return torch.rand_like(hidden, dtype=torch.float32) >= self.dropout

    def set_magnitudes(self, layer: Any) -> None:
        """DoRA begins with the norms of the rows that there are: the layer then computes what it did."""
        norms_O = self._norms_O(layer, _Operands.of(layer, self))
        with torch.no_grad():
            for each, rows in zip(self.projections, self.rows(norms_O.device), strict=True):
                self._tensor(layer, f"magnitude_{each.short_name}").data.copy_(norms_O[rows])

    def _magnitudes_over_norms_O(self, layer: Any, operands: _Operands) -> Tensor:
        """DoRA's factor on every output: magnitude over the norm of the row, which is held constant (section 4.3 of the
        paper); 1 where a projection has no adapter."""
        norms_O = self._norms_O(layer, operands)
        magnitudes_O = norms_O.clone()
        for each, rows in zip(self.projections, self.rows(norms_O.device), strict=True):
            magnitude = self._tensor(layer, f"magnitude_{each.short_name}")
            magnitudes_O = magnitudes_O.index_copy(0, rows, magnitude.to(norms_O.dtype))
        return magnitudes_O / norms_O

    @torch.no_grad()
    def _norms_O(self, layer: Any, operands: _Operands) -> Tensor:
        """Norms of the rows of W + scaling B A, float32, from the parts of the square: no matrix of W's size is made."""
        weight_OI, a_RI = layer.weight, self._tensor(layer, "lora_A")
        bs = [self._tensor(layer, f"lora_B_{each.short_name}") for each in self.projections]
        if self._squares_O is None:
            # PEFT makes new magnitudes by this function, and the root of a square is what it was: then the quotient is 1.
            self._squares_O = torch.cat([torch.linalg.norm(rows.float(), dim=1) for rows in weight_OI.split(1024)]).square()
        stacked_OR = self.stacked_OR(bs, len(weight_OI)).float()
        products_OR = 2 * (weight_OI @ a_RI.t()).float() + stacked_OR @ (a_RI.float() @ a_RI.float().t())
        squares_O = self._squares_O + (products_OR * stacked_OR).sum(1)
        if self.is_row_parallel and operands.group is not None:
            dist.all_reduce(squares_O, group=operands.group)
        return squares_O.sqrt()


@dataclass(frozen=True)
class _Operands:
    """What the operations take besides tensors.

    Attributes:
        group: the ranks that share the layer's matrices; None: there is one.
        is_expert: sums over the group are the dispatcher's.
    """

    adapter: LinearAdapter
    group: dist.ProcessGroup | None
    is_sequence_parallel: bool
    is_expert: bool

    @classmethod
    def of(cls, layer: Any, adapter: LinearAdapter) -> _Operands:
        group = layer.tp_group if dist.get_world_size(layer.tp_group) > 1 else None
        is_expert = bool(layer.is_expert)
        return cls(adapter, group, group is not None and layer.sequence_parallel and not is_expert, is_expert)

    def summed_for_parameter(self, tensor: Tensor) -> Tensor:
        """What the dispatcher leaves in parts, whole, where a gradient is taken of it."""
        if self.group is not None and self.is_expert:
            tensor = tensor.clone()
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gathered(self, tensor: Tensor, new: Callable[[Sequence[int]], Tensor] | None = None) -> Tensor:
        """The rows of all ranks where each has its part of the sequence."""
        if not self.is_sequence_parallel:
            return tensor
        shape = (len(tensor) * dist.get_world_size(self.group), *tensor.shape[1:])
        whole = tensor.new_empty(shape) if new is None else new(shape)
        dist.all_gather_into_tensor(whole, tensor.contiguous(), group=self.group)
        return whole

    def reduced(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """The sum over the group, of this rank's part of the sequence where each has one; and what to wait for."""
        if self.group is None or self.is_expert:
            return tensor, None
        if not self.is_sequence_parallel:
            return tensor, dist.all_reduce(tensor, group=self.group, async_op=True)
        part = tensor.new_empty((len(tensor) // dist.get_world_size(self.group), *tensor.shape[1:]))
        return part, dist.reduce_scatter_tensor(part, tensor, group=self.group, async_op=True)

    def dropped(self, input_TI: Tensor, kept_TI: Tensor | None) -> Tensor:
        """What dropout makes of the adapters' input, or of its gradient."""
        return input_TI if kept_TI is None else input_TI * kept_TI / (1 - self.adapter.dropout)


class _ColumnParallel(torch.autograd.Function):
    """(hidden, W, bias, A, kept, operands, *B) -> the layer's output with its adapters'."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        kept: Tensor | None,
        operands: _Operands,
        *bs: Tensor,
    ) -> Tensor:
        input_tI = _rows(hidden)
        output_TO = operands.gathered(input_tI, _buffer(hidden)) @ weight_OI.t()
        if bias_O is not None:
            output_TO += bias_O
        low_TR = operands.gathered(operands.dropped(input_tI, _flat(kept)) @ a_RI.t())
        operands.adapter.add_outputs(output_TO, low_TR, bs)
        ctx.save_for_backward(hidden, weight_OI, a_RI, kept, low_TR, *bs)
        ctx.operands = operands
        return output_TO.view(-1, *hidden.shape[1:-1], len(weight_OI))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight_OI, a_RI, kept, low_TR, *bs = ctx.saved_tensors
        operands, gradient_TO = ctx.operands, _rows(gradients[0])
        low_gradient_TR = operands.adapter.low_gradient_TR(gradient_TO, bs)
        low_gradient_tR, low_sum = operands.reduced(low_gradient_TR)
        input_gradient, input_sum = None, None
        if ctx.needs_input_grad[0]:
            input_gradient, input_sum = operands.reduced(gradient_TO @ weight_OI)
        b_gradients = operands.adapter.b_gradients(gradient_TO, low_TR)
        _wait(low_sum)
        dropped_tI = operands.dropped(_rows(hidden), _flat(kept))
        a_gradient = operands.summed_for_parameter(low_gradient_tR).t() @ dropped_tI
        _wait(input_sum)
        if input_gradient is not None:
            _add_low(input_gradient, low_gradient_tR, a_RI, operands, _flat(kept))
            input_gradient = input_gradient.view(hidden.shape)
        return input_gradient, None, None, a_gradient, None, None, *b_gradients


class _RowParallel(torch.autograd.Function):
    """(hidden, W, None, A, kept, operands, *B) -> the layer's output with its adapters', before its bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight_OI: Tensor,
        bias_O: None,
        a_RI: Tensor,
        kept: Tensor | None,
        operands: _Operands,
        *bs: Tensor,
    ) -> Tensor:
        input_TI = _rows(hidden)
        output_tO, output_sum = operands.reduced(input_TI @ weight_OI.t())
        low_tR, low_sum = operands.reduced(operands.dropped(input_TI, _flat(kept)) @ a_RI.t())
        _wait(output_sum)
        _wait(low_sum)
        operands.adapter.add_outputs(output_tO, low_tR, bs)
        ctx.save_for_backward(hidden, weight_OI, a_RI, kept, low_tR, *bs)
        ctx.operands = operands
        return output_tO.view(-1, *hidden.shape[1:-1], len(weight_OI))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight_OI, a_RI, kept, low_tR, *bs = ctx.saved_tensors
        operands, gradient_tO = ctx.operands, _rows(gradients[0])
        gradient_TO = operands.gathered(gradient_tO, _buffer(gradients[0]))
        low_gradient_TR = operands.adapter.low_gradient_TR(gradient_TO, bs)
        b_gradients = operands.adapter.b_gradients(gradient_tO, operands.summed_for_parameter(low_tR))
        a_gradient = low_gradient_TR.t() @ operands.dropped(_rows(hidden), _flat(kept))
        input_gradient = None
        if ctx.needs_input_grad[0]:
            input_gradient = gradient_TO @ weight_OI
            _add_low(input_gradient, low_gradient_TR, a_RI, operands, _flat(kept))
            input_gradient = input_gradient.view(hidden.shape)
        return input_gradient, None, None, a_gradient, None, None, *b_gradients


def _add_low(
    input_gradient_TI: Tensor, low_gradient_TR: Tensor, a_RI: Tensor, operands: _Operands, kept_TI: Tensor | None
) -> None:
    """Add what the adapters' input gets to what the layer's own gets."""
    if kept_TI is None:
        input_gradient_TI.addmm_(low_gradient_TR, a_RI)
    else:
        input_gradient_TI += operands.dropped(low_gradient_TR @ a_RI, kept_TI)


def _rows(tensor: Tensor) -> Tensor:
    """[..., columns] -> contiguous [rows, columns]."""
    return tensor.contiguous().flatten(0, -2)


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.flatten(0, -2)


def _wait(collective: Any) -> None:
    if collective is not None:
        collective.wait()


def _buffer(like: Tensor) -> Callable[[Sequence[int]], Tensor]:
    """Megatron's shared buffer for what is gathered over tensor ranks and read at once."""
    return lambda shape: parallel_state.get_global_memory_buffer().get_tensor(list(shape), like.dtype, "mpu")
