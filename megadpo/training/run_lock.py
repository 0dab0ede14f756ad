"""One run, one directory: `output_dir/run.lock` names the process that has it, for as long as the run lives.

The file holds where and since when rank 0 runs, and its time of change is renewed by a thread. Whoever finds it asks, on the
same machine, whether that process is still there; of another machine (a shared file system) it can only look whether the
file was touched lately, by the file system's own clock. A lock without its process is taken over.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

from megadpo.errors import UserError
from megadpo.files import make_directory, make_writable_directory

NAME = "run.lock"
SECONDS_BETWEEN_TOUCHES = 15.0
SECONDS_UNTIL_STALE = 120.0
"""After so long without a touch, the process of another machine counts as dead."""


@dataclass(frozen=True)
class Owner:
    """A process, told apart from every other one.

    Attributes:
        began: in clock ticks since the machine's boot: a process id that is used again has another.
        boot: which boot of the machine, and which of its spaces of process ids (containers have their own).
        since: for people.
    """

    host: str
    process: int
    began: int
    boot: str
    since: str

    @classmethod
    def this_process(cls) -> Owner:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(socket.gethostname(), os.getpid(), _began(os.getpid()) or 0, _boot(), now)

    def is_alive(self) -> bool | None:
        """None: it cannot be known here."""
        if (self.host, self.boot) != (socket.gethostname(), _boot()):
            return None
        return _began(self.process) == self.began

    def __str__(self) -> str:
        return f"{self.host}, process {self.process}, since {self.since}"


def _began(process: int) -> int | None:
    """When a process was started, in ticks since boot (0 where the system does not tell); None: there is none, or it is
    dead and only waits for its parent to notice."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[-1].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return 0
    return 0


def _boot() -> str:
    parts = []
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


@dataclass
class Lock:
    """A directory that is this process's own.

    Attributes:
        taken_by: who has taken it over, as this process seemed dead: it was stopped for minutes.
    """

    directory: Path
    owner: Owner
    taken_by: Owner | None = None

    def check(self) -> None:
        """Raises UserError where the directory is another run's by now."""
        if self.taken_by is not None:
            raise UserError(
                f"output_dir: {self.directory} was taken over by another run ({self.taken_by}) while this one gave no sign "
                "of life; this one ends without saving"
            )


@contextlib.contextmanager
def owning(directory: Path) -> Iterator[Lock]:
    """Within, `directory` belongs to this process; it is made where it is not there, and goes again if nothing came into it.

    Raises:
        UserError: another run has it, or it cannot be made or written.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    make_directory(directory, "output_dir")
    make_writable_directory(directory, "output_dir")
    lock = Lock(directory, _take(directory))
    ended = threading.Event()
    touching = threading.Thread(target=_touch, args=(lock, ended), name="megadpo-lock", daemon=True)
    touching.start()
    try:
        yield lock
    finally:
        ended.set()
        touching.join()
        _release(directory / NAME, lock.owner)
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def _take(directory: Path) -> Owner:
    """Makes the lock this process's own."""
    path, owner = directory / NAME, Owner.this_process()
    try:
        with _opened(path) as file:
            other = _read(file)
            if other is not None and not _is_stale(other, path):
                raise UserError(
                    f"output_dir: {directory} is in use by another run ({other}); wait until that has ended, end it, or "
                    f"choose another directory{_advice(other, path)}"
                )
            _write(file, owner)
    except OSError as error:
        raise UserError(f"output_dir: {path} cannot be written: {error.strerror}") from error
    return owner


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """The lock's file, made where it is not there; nobody else reads or writes it meanwhile.

    The kernel's lock is held for this moment only: processes that are forked later would inherit it and outlive the run.
    """
    while True:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+", encoding="utf-8") as file:
            with contextlib.suppress(OSError):  # some file systems of clusters have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                is_current = os.fstat(file.fileno()).st_ino == path.stat().st_ino
            except FileNotFoundError:
                is_current = False
            if is_current:  # and not one whose owner has just removed it
                yield file
                return


def _read(file: IO[str]) -> Owner | None:
    """None where the file is empty, or its writer died over it."""
    try:
        return Owner(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None


def _write(file: IO[str], owner: Owner) -> None:
    file.seek(0)
    file.truncate()
    json.dump(asdict(owner), file)
    file.flush()
    os.fsync(file.fileno())


def _is_stale(owner: Owner, path: Path) -> bool:
    alive = owner.is_alive()
    return _seconds_since_touch(path) > SECONDS_UNTIL_STALE if alive is None else not alive


def _seconds_since_touch(path: Path) -> float:
    """By the clock of the machine that keeps the file: it is compared with a file that is made now."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{NAME}-") as now:
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime


def _advice(owner: Owner, path: Path) -> str:
    if owner.is_alive() is not None:
        return ""
    return (
        f"; if {owner.host} is no longer there, the directory is free {SECONDS_UNTIL_STALE:.0f} s after its last sign of "
        f"life ({_seconds_since_touch(path):.0f} s ago)"
    )


def _touch(lock: Lock, ended: threading.Event) -> None:
    """Says from time to time that the owner lives, as long as the lock is its own."""
    path = lock.directory / NAME
    while not ended.wait(SECONDS_BETWEEN_TOUCHES):
        with contextlib.suppress(OSError), _opened(path) as file:
            found = _read(file)
            if found is not None and found != lock.owner:
                lock.taken_by = found
                return
            if found is None:  # somebody has removed it: an empty one would be free for all
                _write(file, lock.owner)
            os.utime(path)


def _release(path: Path, owner: Owner) -> None:
    """Removes the lock, unless it is another's by now."""
    with contextlib.suppress(OSError), _opened(path) as file:
        if _read(file) == owner or os.fstat(file.fileno()).st_size == 0:
            path.unlink()
