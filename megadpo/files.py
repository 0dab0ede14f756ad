"""Directories that a user names, made or refused in one sentence; files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from megadpo.errors import UserError


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
