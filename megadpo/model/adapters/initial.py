"""Adapters before they have learned anything, drawn so that every layout begins with the same numbers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from megadpo.model.adapters.beginnings import DECOMPOSED
from megadpo.model.adapters.spec import EMBEDDING_A, EMBEDDING_B, KINDS, MAGNITUDE, A, AdapterSpec, B, adapter_shapes
from megadpo.model.families import TensorSource
from megadpo.model.shape import ModelShape


class NewAdapter(TensorSource):
    """The tensors of a new adapter, as `TensorSource`: A drawn by seed and name, B zero, so that the model computes what it
    did; modules that are trained whole as the model has them, and DoRA's magnitudes the norms of its rows.

    A is uniform in ±1 / sqrt(inputs) (`kaiming`, PEFT's default: torch's Kaiming bound with a = sqrt 5) or normal with a
    deviation of 1 / rank (`gaussian`); or both are `begun`, a part of the model (decomposed.py). An embedding's A is
    zero and its B normal, whatever `init` is.
    """

    def __init__(
        self,
        spec: AdapterSpec,
        shape: ModelShape,
        seed: int,
        model: TensorSource,
        begun: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.begun = begun or {}
        self.spec, self.seed, self.model = spec, seed, model
        self._shapes = adapter_shapes(shape, spec)
        self._drawn: tuple[str, Tensor] | None = None

    def names(self) -> Iterable[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if self._kind_of(name) else self.model.dtype(name)

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        kind = self._kind_of(name)
        if kind in (A, B) and self.spec.init in DECOMPOSED:
            return self.begun[name].narrow(dim, start, length)
        if kind in (A, EMBEDDING_B):
            return self._drawn_values(name).narrow(dim, start, length)
        if kind in (B, EMBEDDING_A):
            return torch.zeros(self._shapes[name]).narrow(dim, start, length)
        if kind == MAGNITUDE:
            rows = self.model.read(f"{name.removesuffix(f'.{MAGNITUDE}')}.weight", 0, start, length)
            return rows.float().norm(dim=1)
        return self.model.read(name, dim, start, length)

    def release(self) -> None:
        self._drawn = None

    def _kind_of(self, name: str) -> str | None:
        return next((kind for kind in KINDS if name.endswith(f".{kind}")), None)

    def _drawn_values(self, name: str) -> Tensor:
        if self._drawn is None or self._drawn[0] != name:
            seed = hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=8).digest()
            random = torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1)
            size = self._shapes[name]
            if self._kind_of(name) == EMBEDDING_B:
                values = torch.randn(size, generator=random)
            elif self.spec.init == "gaussian":
                values = torch.randn(size, generator=random) / size[0]
            else:
                values = (torch.rand(size, generator=random) * 2 - 1) / math.sqrt(size[1])
            self._drawn = name, values
        return self._drawn[1]
