"""Rotary frequencies of a layer, and what becomes of them in longer sequences.

A kind of rope whose frequencies depend on a sequence's length takes those of the sequence by itself, prompt and response,
as transformers does with a batch of this one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class ByLength(Protocol):
    """Frequencies by a sequence's length; sequences of the same `kind` have the same."""

    def kind(self, length: int) -> int:
        """0 of a sequence that has the rope's own frequencies."""
        ...

    def inverse_frequencies_of(self, kind: int) -> Tensor:
        """[R / 2], float32 on the CPU, of another kind than 0."""
        ...


@dataclass(frozen=True)
class Rope:
    """A layer's rotary embedding.

    Attributes:
        theta: the base of the frequencies before any scaling; says which rope it is where layers have several.
        inverse_frequencies: [R / 2], float32 on the CPU, of the first R columns of a head: the others are not turned.
        scaling: the factor on cosine and sine.
        by_length: the frequencies of longer sequences, where these have others.
    """

    theta: float
    inverse_frequencies: Tensor = field(compare=False, repr=False)
    scaling: float = 1.0
    by_length: ByLength | None = None


@dataclass(frozen=True)
class LongFrequencies:
    """longrope (arXiv:2402.13753): other frequencies for every sequence longer than `original_positions`."""

    original_positions: int
    inverse_frequencies: Tensor = field(compare=False, repr=False)

    def kind(self, length: int) -> int:
        return int(length > self.original_positions)

    def inverse_frequencies_of(self, kind: int) -> Tensor:
        return self.inverse_frequencies


@dataclass(frozen=True)
class DynamicFrequencies:
    """Dynamic NTK scaling: a base that grows with the length of a sequence longer than `max_positions`.

    Attributes:
        num_columns: R, that are turned.
    """

    max_positions: int
    theta: float
    factor: float
    num_columns: int

    def kind(self, length: int) -> int:
        return length if length > self.max_positions else 0

    def inverse_frequencies_of(self, kind: int) -> Tensor:
        """In float32, as transformers computes them from the length of a batch."""
        dim = self.num_columns
        growth = self.factor * torch.tensor(kind) / self.max_positions - (self.factor - 1)
        base = self.theta * growth ** (dim / (dim - 2))
        return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
