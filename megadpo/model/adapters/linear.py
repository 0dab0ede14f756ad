"""Adapters beside Megatron's tensor-parallel linear layers: W x + scaling B A x, one autograd operation a layer.

A Megatron layer may be several Hugging Face projections in one (queries, keys and values; gate and up). Each has an adapter
of its own; here their A are stacked to one matrix, which reads x once, and the products with their B are added to the
layer's own output as they are computed. The operation, and what is summed over ranks, is in products.py.

Axes: T tokens of the layer's stream, t of this rank's part under sequence parallelism, I inputs and O outputs of the layer
on this rank, R the ranks of its adapters added up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from megadpo.model.adapters.products import ColumnParallel, Operands, RowParallel
from megadpo.model.layer_ranks import LayerRanks

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
        operation = RowParallel if self.is_row_parallel else ColumnParallel
        ranks = LayerRanks.of(layer)
        output = operation.apply(
            hidden,
            None if layer.four_bit is not None else layer.weight,
            None if self.use_dora or self.is_row_parallel else bias,
            self._tensor(layer, "lora_A"),
            self._kept_inputs(layer, hidden, ranks),
            Operands(self, ranks, layer.four_bit),
            *(self._tensor(layer, f"lora_B_{each.short_name}") for each in self.projections),
        )
        if self.use_dora:
            output = (output * self._magnitudes_over_norms_O(layer, ranks)).to(output.dtype)
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

    def _kept_inputs(self, layer: Any, hidden: Tensor, ranks: LayerRanks) -> Tensor | None:
        """Which inputs dropout leaves, [t, 1, I]; None without. Ranks with parts of the inputs draw for themselves."""
        if not self.dropout or not layer.adapter_switch.drops:
            return None
        has_part = self.is_row_parallel or ranks.is_sequence_parallel
        with get_cuda_rng_tracker().fork() if has_part and ranks.group is not None else contextlib.nullcontext():
            return torch.rand_like(hidden, dtype=torch.float32) >= self.dropout

    def set_magnitudes(self, layer: Any) -> None:
        """DoRA begins with the norms of the rows that there are: the layer then computes what it did."""
        norms_O = self._norms_O(layer, LayerRanks.of(layer))
        with torch.no_grad():
            for each, rows in zip(self.projections, self.rows(norms_O.device), strict=True):
                self._tensor(layer, f"magnitude_{each.short_name}").data.copy_(norms_O[rows])

    def _magnitudes_over_norms_O(self, layer: Any, ranks: LayerRanks) -> Tensor:
        """DoRA's factor on every output: magnitude over the norm of the row, which is held constant (section 4.3 of the
        paper); 1 where a projection has no adapter."""
        norms_O = self._norms_O(layer, ranks)
        magnitudes_O = norms_O.clone()
        for each, rows in zip(self.projections, self.rows(norms_O.device), strict=True):
            magnitude = self._tensor(layer, f"magnitude_{each.short_name}")
            magnitudes_O = magnitudes_O.index_copy(0, rows, magnitude.to(norms_O.dtype))
        return magnitudes_O / norms_O

    @torch.no_grad()
    def _norms_O(self, layer: Any, ranks: LayerRanks) -> Tensor:
        """Norms of the rows of W + scaling B A, float32, from the parts of the square: no matrix of W's size is made."""
        weight_OI, a_RI = layer.dense_weight(), self._tensor(layer, "lora_A")
        bs = [self._tensor(layer, f"lora_B_{each.short_name}") for each in self.projections]
        if self._squares_O is None:
            # PEFT makes new magnitudes by this function, and the root of a square is what it was: then the quotient is 1.
            self._squares_O = torch.cat([torch.linalg.norm(rows.float(), dim=1) for rows in weight_OI.split(1024)]).square()
        stacked_OR = self.stacked_OR(bs, len(weight_OI)).float()
        products_OR = 2 * (weight_OI @ a_RI.t()).float() + stacked_OR @ (a_RI.float() @ a_RI.float().t())
        squares_O = self._squares_O + (products_OR * stacked_OR).sum(1)
        if self.is_row_parallel and ranks.group is not None:
            dist.all_reduce(squares_O, group=ranks.group)
        return squares_O.sqrt()
