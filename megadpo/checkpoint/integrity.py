"""What a checkpoint's files must be, byte by byte: sizes and hashes, written with them and compared before they are read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megadpo.checkpoint.hf import MAX_JSON_BYTES
from megadpo.errors import UserError
from megadpo.files import ALGORITHM, hash_of_file

MOST_THREADS = 8


@dataclass(frozen=True)
class FileRecord:
    """What a file must be.

    Attributes:
        size: in bytes.
        digest: XXH3 (128 bits) of them, in hexadecimal.
    """

    size: int
    digest: str

    def to_json(self) -> dict[str, int | str]:
        return {"bytes": self.size, ALGORITHM: self.digest}

    @staticmethod
    def of_json(entry: Any) -> FileRecord:
        """Raises KeyError, TypeError or ValueError where it is none."""
        size, digest = entry["bytes"], entry[ALGORITHM]
        if type(size) is not int or size < 0 or not isinstance(digest, str):
            raise ValueError(entry)
        return FileRecord(size, digest)


class Hasher:
    """Makes a record of bytes that come one block after the other."""

    def __init__(self) -> None:
        self._hash, self._size = xxhash.xxh3_128(), 0

    def update(self, block: bytes | memoryview) -> None:
        self._hash.update(block)
        self._size += len(block)

    def record(self) -> FileRecord:
        return FileRecord(self._size, self._hash.hexdigest())


def record_of(content: bytes) -> FileRecord:
    """The record of a file of these bytes."""
    return FileRecord(len(content), xxhash.xxh3_128_hexdigest(content))


def read_bytes(path: Path) -> bytes:
    """The bytes of a JSON file.

    Raises:
        UserError: it cannot be read, or is huge.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path} is larger than {MAX_JSON_BYTES} bytes; that is no index")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def check_sizes(directory: Path, files: Mapping[str, FileRecord]) -> None:
    """Compare every file's size.

    Raises:
        UserError: naming the first file that is missing, or shorter or longer than what was written.
    """
    for name, record in sorted(files.items()):
        path = directory / name
        try:
            size = os.stat(path).st_size if path.is_file() else None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        if size is None:
            raise UserError(f"{path} is missing")
        if size != record.size:
            is_truncated = "is truncated: it " if size < record.size else ""
            raise UserError(f"{path} {is_truncated}has {size} bytes, not the {record.size} that were written")


def check_bytes(directory: Path, files: Mapping[str, FileRecord], share: int = 0, num_shares: int = 1) -> None:
    """Read and hash files, several at once, and compare.

    Args:
        share: of `num_shares` processes that divide the files among them, this one's number.

    Raises:
        UserError: naming the first file (by name) whose bytes are not those that were written.
    """
    check_sizes(directory, files)
    own = share_of(files, share, num_shares)
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="megadpo-verify") as pool:
        digests = pool.map(lambda name: _digest(directory / name), own)
        for name, digest in zip(own, digests, strict=True):
            if digest != files[name].digest:
                raise UserError(f"{directory / name} is damaged: its bytes are not those that were written")


def share_of(files: Mapping[str, FileRecord], share: int, num_shares: int) -> list[str]:
    """The names of one share's files: the largest first, each to the share that has the fewest bytes so far."""
    loads = [0] * num_shares
    own = []
    for name in sorted(files, key=lambda name: (-files[name].size, name)):
        lightest = loads.index(min(loads))
        loads[lightest] += files[name].size
        if lightest == share:
            own.append(name)
    return sorted(own)


def _digest(path: Path) -> str:
    try:
        return hash_of_file(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def records_in(entries: Any) -> dict[str, FileRecord]:
    """The records of a directory's files, as an index holds them.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: they are none, or a name leads out of the directory.
    """
    records = {name: FileRecord.of_json(entry) for name, entry in entries.items()}
    if any(not _stays_inside(name) for name in records):
        raise ValueError(entries)
    return records


def _stays_inside(name: str) -> bool:
    parts: Iterable[str] = name.split("/")
    return "\\" not in name and all(part not in ("", ".", "..") for part in parts)
