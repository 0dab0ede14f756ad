"""Directories that a user names, made or refused in one sentence; files that are there whole or not at all; JSON that
has its own hash."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from megadpo.errors import UserError

ALGORITHM = "xxh3_128"
"""XXH3 of 128 bits finds whatever disks, networks and half-done copies do, at the speed of memory (13 GB/s where blake2b
does 0.6). It is no seal against somebody who means to deceive, who would write its hash as well."""
SEAL = f'{{"{ALGORITHM}": "'.encode()
"""What a sealed JSON file begins with; then come the hash, in hexadecimal, of all bytes after it, and these."""
HASH_CHARACTERS = 32
BLOCK_BYTES = 1 << 22


def make_directory(directory: Path, setting: str) -> None:
    """Make `directory`, and those above it, where they are not there yet.

    Raises:
        UserError: naming `setting`, the directory and why it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{setting}: {directory} cannot be made: {error.strerror}") from error


def make_writable_directory(directory: Path, setting: str) -> None:
    """As `make_directory`, of a directory that files will be made in.

    Raises:
        UserError: it cannot be made, or not be written.
    """
    make_directory(directory, setting)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"{setting}: {directory} cannot be written; choose another directory")


def expanded(path: str, setting: str) -> Path:
    """A path with `~` and `$VARIABLES` replaced; one that is there as it is written stays so.

    Raises:
        UserError: naming `setting` and a variable that is not set.
    """
    if os.path.exists(path):
        return Path(path)
    found = os.path.expandvars(os.path.expanduser(path))
    unset = re.search(r"\$\w+|\$\{[^}]*\}", found)
    if unset is not None:
        raise UserError(f"{setting}: {path} names {unset.group()}, which is not set here; set it or write it out")
    return Path(found)


def cannot_be_used(setting: str, path: Path, error: OSError) -> str:
    """Why something that users may share, such as a cache, is of no use here, and what to do."""
    hint = "have its owner open it to you, or " if isinstance(error, PermissionError) else "make room, or "
    return (
        f"{setting}: {path} cannot be read or written ({error.strerror or error}); {hint}set {setting} to another directory"
    )


def put_away(path: Path) -> None:
    """Remove a file, a link or a directory, if it is there; nobody sees it half removed.

    Raises:
        OSError: it cannot be.
    """
    if not os.path.lexists(path):
        return
    aside = path.with_name(f".{path.name}-{uuid.uuid4().hex}.damaged")
    path.rename(aside)
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside)
    else:
        aside.unlink()


def require_new_file(path: Path, setting: str, force: bool) -> Path:
    """Check, before anything is computed, that a file can be written: where to write it, which is where a link leads.

    Args:
        setting: how the user named it.
        force: it may replace a file.

    Raises:
        UserError: it is a directory, it exists, or its directory cannot be written.
    """
    try:
        target = path.resolve()
        if target.is_dir():
            raise UserError(f"{setting}: {path} is a directory; give a file name")
        if is_special(target):
            return target
        if target.exists() and not force:
            raise UserError(f"{setting}: {path} exists already; choose another file, or add --force to replace it")
    except (OSError, RuntimeError) as error:  # a loop of links
        raise UserError(f"{setting}: {path} cannot be written: {error}") from error
    make_writable_directory(target.parent, setting)
    return target


def is_special(path: Path) -> bool:
    """Whether something is there that is neither a file nor a directory: a device, a pipe, a socket."""
    return path.exists() and not path.is_file() and not path.is_dir()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what is to become the file `path`: it gets its name when the block ends well, else it is removed.

    Raises:
        OSError: it cannot be renamed.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def hash_of_file(path: Path) -> str:
    """XXH3 of a file's bytes, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    hasher, block = xxhash.xxh3_128(), bytearray(BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        for size in iter(functools.partial(file.readinto, block), 0):
            hasher.update(memoryview(block)[:size])
    return str(hasher.hexdigest())


def sealed(content: Mapping[str, Any]) -> bytes:
    """JSON text of an object, with the hash of all that follows as its first value; `content` is not empty."""
    rest = b'", ' + json.dumps(content, allow_nan=False).encode()[1:] + b"\n"
    return SEAL + xxhash.xxh3_128_hexdigest(rest).encode() + rest


def is_sealed(text: bytes) -> bool:
    """Whether a file's bytes begin as those that `sealed` makes, and their hash is the one that they name."""
    start = len(SEAL) + HASH_CHARACTERS
    return text.startswith(SEAL) and xxhash.xxh3_128_hexdigest(memoryview(text)[start:]).encode() == text[len(SEAL) : start]
