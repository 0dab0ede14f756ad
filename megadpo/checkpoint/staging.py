"""Directories that appear and go whole or not at all: written as ``NAME.tmp`` in the same parent directory, then renamed;
renamed to ``NAME.deleted``, then removed.

A directory that somebody has moved and linked is followed: what is new comes to where the link leads.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megadpo.errors import UserError


def staging(directory: Path) -> Path:
    """Where the files of `directory` are written until `publish`."""
    return _beside(followed(directory), ".tmp")


def _beside(directory: Path, end: str) -> Path:
    return directory.with_name(directory.name + end)


def followed(directory: Path) -> Path:
    """The directory itself, or where it leads if it is a link.

    Raises:
        UserError: the link leads to no directory.
    """
    if not directory.is_symlink():
        return directory
    if not directory.is_dir():
        raise UserError(
            f"{directory} is a link to {os.readlink(directory)}, where there is no directory; make it, or remove the link"
        )
    return directory.resolve()


def begin(directory: Path) -> Path:
    """An empty staging directory; what a crash left there is removed. One process calls it, before any writer.

    Raises:
        UserError: it cannot be made.
    """
    partial = staging(directory)
    with writing(directory):
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    return partial


def publish(directory: Path) -> None:
    """Give the staging directory its final name, in place of what had it. One process calls it, after all writers.

    Raises:
        UserError: the disk refuses.
    """
    directory = followed(directory)
    partial, old = _beside(directory, ".tmp"), _beside(directory, ".old")
    with writing(directory):
        for path in (*partial.rglob("*"), partial):
            sync(path)
        if directory.exists():
            remove(old)
            directory.rename(old)  # until the next line is through there is only the old one: `clean_up` puts it back
        partial.rename(directory)
        sync(directory.parent)
        remove(old)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the disk refuses within, in one sentence.

    Raises:
        UserError: naming the path, and why it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def remove(directory: Path) -> None:
    """Remove a directory where there is one: at no time is there a part of it under its name. Of a link, the link goes."""
    if directory.is_symlink():
        directory.unlink()
        return
    going = _beside(directory, ".deleted")
    if going.exists():  # a process was killed over it
        shutil.rmtree(going)
    if directory.exists():
        directory.rename(going)
        shutil.rmtree(going)


def clean_up(directory: Path) -> list[Path]:
    """Remove what processes that were killed have left beside `directory`, and give back what was about to be replaced.

    Nobody else may write there.

    Returns:
        What was removed.
    """
    directory = followed(directory)
    old = _beside(directory, ".old")
    if old.is_dir() and not directory.exists():
        old.rename(directory)
    found = [path for end in (".tmp", ".old", ".deleted") if (path := _beside(directory, end)).is_dir()]
    for path in found:
        shutil.rmtree(path)
    return found


def abandon(directory: Path) -> None:
    """Remove the staging directory, after a failure."""
    shutil.rmtree(staging(directory), ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_existing(directory: Path) -> None:
    """Raise UserError where `directory` is a file or holds something."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists and is not an empty directory; choose another one or remove it")
