"""A model with its adapters added: W + scaling * B A, read slice by slice, so that the whole is never in memory."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from megadpo.model.adapters.spec import (
    EMBEDDING_A,
    EMBEDDING_B,
    EMBEDDING_MODULE,
    HEAD_MODULE,
    MAGNITUDE,
    A,
    AdapterSpec,
    B,
)
from megadpo.model.families import HEAD, TensorSource
from megadpo.model.families.common import EMBEDDING
from megadpo.model.shape import ModelShape

ROWS_AT_A_TIME = 1024
_WEIGHT = ".weight"


class MemorySource:
    """Logical tensors in host memory, as a TensorSource."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        return self._tensors[name].narrow(dim, start, length)

    def release(self) -> None:
        """Nothing is read from files."""


def unties(spec: AdapterSpec, shape: ModelShape) -> bool:
    """Whether embedding and head, one matrix in this model, are two with the adapter added: it is added to one of them, or
    each has its own."""
    is_one = shape.tied_embeddings and shape.head == "logprobs"
    return is_one and (EMBEDDING_MODULE in spec.modules or HEAD_MODULE in spec.modules)


class UntiedSource:
    """The tensors of a tied model with the embedding as its head, too, as a TensorSource."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source

    def names(self) -> Iterable[str]:
        return dict.fromkeys([*self._source.names(), HEAD])

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._held(name))

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._held(name))

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        return self._source.read(self._held(name), dim, start, length)

    def release(self) -> None:
        self._source.release()

    @staticmethod
    def _held(name: str) -> str:
        return EMBEDDING if name == HEAD else name


class MergedSource:
    """The logical tensors of a model with an adapter added, as a TensorSource: computed in float32 as they are read.

    A matrix with an adapter is W + scaling * B A; with DoRA (arXiv:2402.09353, eq. 5) each row of that is brought to the
    length that its magnitude says. Modules that were trained whole come from the adapter.

    Args:
        base: of the model alone.
        adapter: with the names of `adapter_shapes`.
        factor: of what is added; -1: it is taken away, as where an adapter began as a part of the model.
    """

    def __init__(self, base: TensorSource, adapter: TensorSource, spec: AdapterSpec, factor: float = 1.0) -> None:
        self._base, self._adapter, self._spec, self._factor = base, adapter, spec, factor
        self._adapted = {f"{module}{_WEIGHT}": module for module in spec.modules}
        self._saved = {f"{module}{_WEIGHT}" for module in spec.modules_to_save}
        self._row_factors = functools.lru_cache(maxsize=4)(self._row_factors_of)

    def names(self) -> Iterable[str]:
        return dict.fromkeys([*self._base.names(), *self._saved])

    def shape(self, name: str) -> tuple[int, ...]:
        return self._adapter.shape(name) if name in self._saved else self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        if name in self._adapted:
            return torch.float32
        return self._adapter.dtype(name) if name in self._saved else self._base.dtype(name)

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        if name in self._saved:
            return self._adapter.read(name, dim, start, length)
        if name not in self._adapted:
            return self._base.read(name, dim, start, length)
        module, weight = self._adapted[name], self._base.read(name, dim, start, length)
        first = start if dim == 0 else 0
        columns = (start, length) if dim == 1 else (0, self.shape(name)[1])
        merged = torch.empty(weight.shape, dtype=torch.float32)  # what is read may be the mapped file: it is left as it is
        for row in range(0, len(weight), ROWS_AT_A_TIME):
            rows = slice(row, min(row + ROWS_AT_A_TIME, len(weight)))
            product = self._product(module, (first + row, rows.stop - row), columns)
            torch.add(weight[rows].float(), product, out=merged[rows])
        if self._spec.use_dora:
            merged *= self._row_factors(module)[first : first + len(weight)].unsqueeze(1)
        return merged

    def release(self) -> None:
        self._base.release()
        self._adapter.release()

    def _product(self, module: str, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        if module == EMBEDDING_MODULE:
            left = self._adapter.read(f"{module}.{EMBEDDING_A}", 1, *rows).float().t()
            right = self._adapter.read(f"{module}.{EMBEDDING_B}", 0, *columns).float().t()
        else:
            left = self._adapter.read(f"{module}.{B}", 0, *rows).float()
            right = self._adapter.read(f"{module}.{A}", 1, *columns).float()
        return left @ right * (self._factor * self._spec.scaling(module))

    def _row_factors_of(self, module: str) -> Tensor:
        """DoRA's magnitude over the length of each row [out], some rows in memory at a time."""
        num_rows, num_columns = self.shape(f"{module}{_WEIGHT}")
        lengths = []
        for first in range(0, num_rows, ROWS_AT_A_TIME):
            rows = (first, min(ROWS_AT_A_TIME, num_rows - first))
            weight = self._base.read(f"{module}{_WEIGHT}", 0, *rows).float()
            lengths.append((weight + self._product(module, rows, (0, num_columns))).norm(dim=1))
        return self._adapter.read(f"{module}.{MAGNITUDE}", 0, 0, num_rows).float() / torch.cat(lengths)
