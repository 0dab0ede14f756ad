"""A safetensors file, written piece by piece: hashed meanwhile, on the disk when that is done, or not there at all.

The bytes are those that safetensors' own `save_file` writes, which hashes nothing, and hides why a disk refuses.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from megadpo.checkpoint.hf import DTYPES
from megadpo.checkpoint.integrity import FileRecord, Hasher
from megadpo.errors import UserError

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FILE_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")
"""In a file the tensors of the largest types come first, and of a type in the order of their names."""
BLOCK_BYTES = 1 << 22


def write_tensor_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> FileRecord:
    """Write tensors of host memory under their names; the record of the file's bytes.

    Args:
        metadata: texts that the file's head has beside its format.

    Raises:
        UserError: the disk is full or refuses; the file is removed.
    """
    names = sorted(tensors, key=lambda name: (FILE_ORDER.index(DTYPE_NAMES[tensors[name].dtype]), name.encode()))
    content = [_header(names, tensors, metadata or {}), *(_bytes_of(tensors[name]) for name in names)]
    with ThreadPoolExecutor(1, "megadpo-hash") as beside:  # the disk is what takes time
        record = beside.submit(_record_of, content)
        try:
            with path.open("wb", buffering=0) as file:
                for part in _blocks(content):
                    while part:  # a disk that has filled takes a part of it first
                        part = part[file.write(part) :]
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            raise UserError(f"{path} cannot be written: {error.strerror}") from error
        return record.result()


def _record_of(content: list[memoryview]) -> FileRecord:
    hasher = Hasher()
    for block in _blocks(content):
        hasher.update(block)
    return hasher.record()


def _blocks(content: list[memoryview]) -> Iterator[memoryview]:
    for piece in content:
        for start in range(0, len(piece), BLOCK_BYTES):
            yield piece[start : start + BLOCK_BYTES]


def _header(names: list[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> memoryview:
    """The length of the JSON that follows, as eight bytes, and the JSON: type, shape and place of every tensor."""
    content: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        dtype, shape = DTYPE_NAMES[tensors[name].dtype], list(tensors[name].shape)
        content[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(len(text).to_bytes(8, "little") + text)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
