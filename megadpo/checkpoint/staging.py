"""Directories that appear whole or not at all: written as ``NAME.tmp`` in the same parent directory, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megadpo.errors import UserError


def staging(directory: Path) -> Path:
    """Where the files of `directory` are written until `publish`."""
    return directory.with_name(f"{directory.name}.tmp")


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
    partial, old = staging(directory), directory.with_name(f"{directory.name}.old")
    with writing(directory):
        for path in (*partial.rglob("*"), partial):
            sync(path)
        if old.exists():
            shutil.rmtree(old)
        if directory.exists():
            directory.rename(old)
        partial.rename(directory)
        sync(directory.parent)
        if old.exists():
            shutil.rmtree(old)


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
