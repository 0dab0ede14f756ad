"""Digests of files that are too large to be read whole each time: small files whole, of large ones the head and blocks.

The head of a safetensors file has names, shapes and places of all tensors. Training, merging or converting a model changes
every tensor and is seen; a single number that somebody changed by hand may not be.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import xxhash

from megadpo.checkpoint.file_names import BIN_INDEX_NAME, BIN_NAME, INDEX_NAME, SINGLE_NAME
from megadpo.errors import UserError

WHOLE_BYTES = 16 << 20
"""Files up to this size are read whole, so many bytes at least of larger ones."""

BLOCK_BYTES = 64 << 10
HEAD_BYTES = 8 << 20


def model_files_digest(huggingface: Path, *directories: Path) -> str:
    """Of the config.json in one directory and the tensors in others, in hexadecimal.

    Raises:
        UserError: a file cannot be read.
    """
    tensors = [file for directory in directories for file in tensor_files(directory)]
    return named_digest((huggingface / "config.json", *tensors))


def tensor_files(directory: Path) -> list[Path]:
    """The files of a directory that may have its tensors: safetensors; pickles, too, where they are what is read."""
    files = sorted(directory.glob("*.safetensors"))
    if files and any((directory / name).is_file() for name in (SINGLE_NAME, INDEX_NAME)):
        return files
    is_pickled = any((directory / name).is_file() for name in (BIN_NAME, BIN_INDEX_NAME))
    return files + sorted(directory.glob("*.bin")) if is_pickled or not files else files


def named_digest(files: Iterable[Path]) -> str:
    """Of files with their names.

    Raises:
        UserError: a file cannot be read.
    """
    return joined(f"{file.name} {file_digest(file)}" for file in files)


def joined(parts: Iterable[str]) -> str:
    """One digest of several, or of other texts."""
    return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())


def file_digest(file: Path) -> str:
    """Of one file.

    Raises:
        UserError: it cannot be read.
    """
    hasher = xxhash.xxh3_128()
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            hasher.update(str(size).encode())
            if size <= WHOLE_BYTES:
                hasher.update(stream.read())
            else:
                hasher.update(stream.read(HEAD_BYTES))
                num_blocks = (WHOLE_BYTES - HEAD_BYTES) // BLOCK_BYTES
                for number in range(1, num_blocks + 1):
                    stream.seek(HEAD_BYTES + (size - BLOCK_BYTES - HEAD_BYTES) * number // num_blocks)
                    hasher.update(stream.read(BLOCK_BYTES))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    return hasher.hexdigest()


def ends_digest(file: Path) -> str:
    """Of one of very many or very large files: its size, its first MiB and its last block.

    Raises:
        UserError: it cannot be read.
    """
    hasher = xxhash.xxh3_128()
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            hasher.update(str(size).encode() + stream.read(1 << 20))
            stream.seek(max(size - BLOCK_BYTES, 0))
            hasher.update(stream.read())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    return hasher.hexdigest()
