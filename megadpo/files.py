"""Directories that a user names, made or refused in one sentence; files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
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
