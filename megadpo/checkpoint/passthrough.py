"""Tensors that a model directory has, and that are neither trained nor computed with: those of multi-token prediction.

They go through checkpoints into exports as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megadpo.checkpoint.tensor_file import write_tensor_file
from megadpo.model.families import ParameterShard, ShardPiece, TensorSource, mtp_names

PASSTHROUGH = "passthrough"
"""Their kind in a checkpoint."""


class Passthrough:
    """Some of a source's tensors, in the types that these have, as a TensorSource.

    Nothing of them is in memory but the mapping of their files, which outlives these files' directory.
    """

    def __init__(self, source: TensorSource, names: Sequence[str]) -> None:
        self._source, self._names = source, tuple(names)

    def names(self) -> Iterable[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        return self._source.read(name, dim, start, length).to(self.dtype(name))

    def release(self) -> None:
        """Kept: they are read whenever something is saved."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each."""
        return {name: self.shape(name) for name in self._names}

    def items(self) -> Iterator[tuple[str, ParameterShard, Tensor]]:
        """What `sharded.write_shard_file` takes."""
        for name, size in self.shapes().items():
            whole = ParameterShard(name, size, None, (ShardPiece(name, 0, 0, 0, size[0]),))
            yield PASSTHROUGH, whole, self.read(name, 0, 0, size[0])

    def num_bytes(self) -> int:
        """Of all of them."""
        return sum(prod(size) * self.dtype(name).itemsize for name, size in self.shapes().items())


def passthrough_of(source: TensorSource, num_layers: int) -> Passthrough | None:
    """Those of a Hugging Face directory of a model with so many layers; None where it has none."""
    names = mtp_names(num_layers, source.names())
    return Passthrough(source, names) if names else None


def write_passthrough(passthrough: Passthrough, directory: Path, max_file_bytes: float = 5e9) -> dict[str, str]:
    """Write them into files ``model-mtp-00001.safetensors``, …; the file of each by its name.

    Raises:
        UserError: the disk refuses.
    """
    files: dict[str, str] = {}
    waiting: dict[str, Tensor] = {}
    number = 1
    for _, shard, tensor in passthrough.items():
        if waiting and sum(one.nbytes for one in waiting.values()) + tensor.nbytes > max_file_bytes:
            write_tensor_file(waiting, directory / _file_name(number))
            waiting, number = {}, number + 1
        waiting[shard.name] = tensor
        files[shard.name] = _file_name(number)
    write_tensor_file(waiting, directory / _file_name(number))
    return files


def _file_name(number: int) -> str:
    return f"model-mtp-{number:05d}.safetensors"
