"""Writes Megatron-core's ``torch_dist`` files (torch_dist.py reads them), a chunk at a time."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megadpo.checkpoint.export import write_json
from megadpo.checkpoint.staging import sync, writing
from megadpo.checkpoint.torch_dist import COMMON, CONFIG, DATA, METADATA


class TorchDistWriter:
    """Writes a checkpoint of that format, a chunk at a time: `add` and `add_empty`, then `finish`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._metadata = Metadata({}, storage_data={}, storage_meta=StorageMeta(), version="1.0.0")
        with writing(directory / DATA):
            self._file: BinaryIO = (directory / DATA).open("xb")

    def add(self, name: str, shape: tuple[int, ...], offsets: tuple[int, ...], values: Tensor) -> None:
        """A chunk of the global tensor `name` of this shape, of the type that its first chunk has."""
        entries = self._metadata.state_dict_metadata
        if name not in entries:
            entries[name] = TensorStorageMetadata(TensorProperties(values.dtype), torch.Size(shape), [])
        entry = entries[name]
        assert isinstance(entry, TensorStorageMetadata) and entry.size == torch.Size(shape)
        assert values.dtype is entry.properties.dtype, (name, values.dtype)
        index = MetadataIndex(name, offsets, len(entry.chunks))
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), values.shape))
        self._write(index, values.contiguous().clone())  # a view would be saved with all that it is a view of

    def add_empty(self, name: str) -> None:
        """An object that Megatron's layers look for, and in which without FP8 there is nothing."""
        self._metadata.state_dict_metadata[name] = BytesStorageMetadata()
        self._write(MetadataIndex(name), [None])

    def _write(self, index: MetadataIndex, content: Any) -> None:
        start = self._file.tell()
        with writing(self._directory / DATA):
            torch.save(content, self._file)
        length = self._file.tell() - start
        self._metadata.storage_data[index] = filesystem._StorageInfo(DATA, start, length)

    def finish(self, common: Mapping[str, Any]) -> None:
        """Write what stands beside the tensors; `common` has plain values only."""
        with writing(self._directory / METADATA):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            torch.save(dict(common), self._directory / COMMON)
            (self._directory / METADATA).write_bytes(pickle.dumps(self._metadata))
            sync(self._directory / METADATA)
        backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        write_json(self._directory / CONFIG, {**backends, "common_backend": "torch", "common_backend_version": 1})

    def close(self) -> None:
        """After a failure."""
        self._file.close()
