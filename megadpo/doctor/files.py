"""The directories of a run: written, locked and renamed in as a run would, and room for its checkpoints."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from megadpo.config.schema import Config
from megadpo.data.rows.dataset import CACHE_SETTING, cache_root
from megadpo.doctor.check import Check
from megadpo.errors import UserError
from megadpo.training.output_dir import claim_output_dir

MUCH_ROOM = 1.5
"""Times what a run needs; below it, other files may well fill the disk."""


def check_directories(config: Config) -> Iterator[Check]:
    """`output_dir` and `data.cache_dir`."""
    if config.output_dir:
        directory = Path(config.output_dir)
        try:
            claim_output_dir(directory, config)
        except UserError as error:
            yield Check("output_dir", "failed", str(error), "Choose another output_dir, or what the sentence says.")
        yield from check_directory("output_dir", directory)
    yield from check_directory(CACHE_SETTING, cache_root(config.data.cache_dir))


def check_directory(setting: str, directory: Path) -> Iterator[Check]:
    """Whether files can be made, renamed and locked there; where it is not there yet, in the nearest one above it.

    Nothing is left behind.
    """
    above = nearest(directory)
    where = str(directory) if above == directory else f"{directory} (not there yet; tried in {above})"
    try:
        with tempfile.TemporaryDirectory(dir=above, prefix=".megadpo-doctor-") as name:
            place = Path(name)
            (place / "a").write_bytes(b"megadpo")
            with (place / "a").open("rb+") as file:
                os.fsync(file.fileno())
            (place / "a").rename(place / "b")
            works = locks_work(place / "lock")
    except OSError as error:
        reason = error.strerror or str(error)
        fix = f"Open it to this user, or set {setting} to another directory."
        yield Check(f"{setting} writable", "failed", f"{where}: {reason}", fix)
        return
    yield Check(f"{setting} writable", "ok", where)
    if works:
        yield Check(f"{setting} locks", "ok", "a second process sees the first one's lock")
    else:
        fix = f"Mount the file system with locks (Lustre: -o flock; NFS: without nolock), or set {setting} to another one."
        yield Check(f"{setting} locks", "warning", f"{where} has no working file locks", fix)


def nearest(directory: Path) -> Path:
    """The directory, or the nearest above it that is there."""
    directory = directory.absolute()
    return next(path for path in (directory, *directory.parents) if path.is_dir())


def locks_work(path: Path) -> bool:
    """Whether a lock on a file keeps another one out."""
    with path.open("w") as one, path.open("w") as other:
        try:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        with contextlib.suppress(OSError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    return True


def bytes_needed(config: Config, trained: Mapping[str, tuple[int, ...]], whole: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of a run's checkpoints and of its export.

    A checkpoint has fp32 weights and AdamW's two moments of all that is trained; `checkpoint.keep` stay while the next one
    is written. The export is in the model's dtype, of adapters these alone.

    Args:
        trained: name -> shape of every tensor that is trained.
        whole: of every tensor of the model.
    """
    num_trained, num_whole = (sum(math.prod(shape) for shape in some.values()) for some in (trained, whole))
    moments = 4 if config.train.moments_dtype == "bf16" else 8
    exported = num_whole if config.adapter.kind == "none" or config.adapter.merge else num_trained
    return num_trained * (4 + moments) * (config.checkpoint.keep + 1) + exported * (2 if config.model.dtype == "bf16" else 4)


def check_disk(directory: Path, needed: int, keep: int, free: int | None = None) -> Check:
    """Whether `directory` has room for the bytes that a run writes.

    Args:
        keep: `checkpoint.keep`.
        free: bytes that are free there; None: they are asked for.
    """
    free = shutil.disk_usage(nearest(directory)).free if free is None else free
    words = f"{_size(free)} free in {directory}, {_size(needed)} needed for {keep} + 1 checkpoints and the export"
    fix = "Make room, lower checkpoint.keep, or set output_dir to a larger disk."
    if free < needed:
        return Check("disk", "failed", words, fix)
    if free < MUCH_ROOM * needed:
        return Check("disk", "warning", words, fix)
    return Check("disk", "ok", words)


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
