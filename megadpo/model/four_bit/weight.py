"""The weight of a frozen linear layer in 4 bits (NF4, arXiv:2305.14314), by bitsandbytes: from a shard, and dense again.

Each Hugging Face matrix is quantised for itself, also where a Megatron layer holds several (queries, keys and values), and
of it what this rank has: a rank that has it whole holds the very bits that transformers would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megadpo.config.schema import ModelConfig
from megadpo.model.families import ParameterShard, ShardPiece, TensorSource

SCALES_IN_A_BLOCK = 256
"""Of double quantisation: so many blocks' scales are quantised with one scale of their own, in bitsandbytes."""


@dataclass(frozen=True)
class FourBit:
    """How weights are quantised.

    Attributes:
        block_size: weights that share a scale, in the order of a matrix's rows.
        double: the scales are held in 8 bits themselves, in blocks of SCALES_IN_A_BLOCK.
    """

    block_size: int = 64
    double: bool = True

    @classmethod
    def of(cls, options: ModelConfig) -> FourBit | None:
        """As the `model` section says; None: weights stay as they are."""
        if options.quantization == "none":
            return None
        return cls(options.quantization_block_size, options.double_quantization)

    def num_bytes(self, num_weights: int) -> int:
        """Of a matrix of so many weights: half a byte each, and the scales."""
        num_blocks = math.ceil(num_weights / self.block_size)
        scales = num_blocks + 4 * math.ceil(num_blocks / SCALES_IN_A_BLOCK) + 4 if self.double else 4 * num_blocks
        return math.ceil(num_weights / 2) + scales


@dataclass(frozen=True)
class _Matrix:
    """One Hugging Face matrix, or this rank's part of one: as bitsandbytes holds it, and which rows of the layer it is."""

    packed: Tensor
    state: Any
    rows: tuple[tuple[int, int], ...]


class FourBitWeight:
    """A layer's weight [O, I]; empty until `fill`."""

    def __init__(self, options: FourBit, dtype: torch.dtype, device: torch.device) -> None:
        self.options, self.dtype, self.device = options, dtype, device
        self._shape: tuple[int, ...] = (0, 0)
        self._matrices: list[_Matrix] = []

    @torch.no_grad()
    def fill(self, shard: ParameterShard, source: TensorSource) -> None:
        """Quantise what `shard` says of `source`; one matrix at a time is in memory as it was."""
        self._shape, self._matrices = shard.shape, []
        assert sum(piece.length for piece in shard.pieces) == shard.shape[shard.pieces[0].dim], shard.name
        for name in dict.fromkeys(piece.logical_name for piece in shard.pieces):
            pieces = sorted((p for p in shard.pieces if p.logical_name == name), key=lambda piece: piece.logical_start)
            packed, state = self._quantised(name, pieces, source)
            self._matrices.append(_Matrix(packed, state, _rows_of(pieces, shard.shape[0])))

    def _quantised(self, name: str, pieces: list[ShardPiece], source: TensorSource) -> tuple[Tensor, Any]:
        from bitsandbytes.functional import quantize_4bit

        parts = [source.read(name, p.dim, p.logical_start, p.length).to(self.dtype) for p in pieces]
        values = torch.cat(parts, pieces[0].dim) if len(parts) > 1 else parts[0]
        return quantize_4bit(
            values.to(self.device).contiguous(),
            blocksize=self.options.block_size,
            compress_statistics=self.options.double,
            quant_type="nf4",
        )

    def dense(self) -> Tensor:
        """The weight in the layer's type, made anew: it is the caller's, to be read and let go."""
        from bitsandbytes.functional import dequantize_4bit

        if len(self._matrices) == 1:
            (matrix,) = self._matrices
            if len(matrix.rows) == 1:
                return dequantize_4bit(matrix.packed, matrix.state)
        weight_OI = torch.empty(self._shape, dtype=self.dtype, device=self.device)
        for matrix in self._matrices:
            values, done = dequantize_4bit(matrix.packed, matrix.state), 0
            for start, length in matrix.rows:
                weight_OI[start : start + length] = values[done : done + length]
                done += length
        return weight_OI

    @property
    def num_bytes(self) -> int:
        """What is held: packed weights and scales."""
        held = []
        for matrix in self._matrices:
            held += [matrix.packed, matrix.state.absmax]
            held += [matrix.state.offset, matrix.state.state2.absmax] if self.options.double else []
        return sum(tensor.nbytes for tensor in held)


def _rows_of(pieces: list[ShardPiece], num_rows: int) -> tuple[tuple[int, int], ...]:
    """(start, length) of a matrix's rows among the layer's, in the matrix's own order; of one cut by columns, all."""
    if pieces[0].dim == 1:
        return ((0, num_rows),)
    return tuple((piece.local_start, piece.length) for piece in pieces)
