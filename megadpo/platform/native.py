"""The C++ and CUDA libraries of csrc/: taken from where `pip install` put them, else compiled on first use into the cache.

Code runs in this process with all that its user may do: only what belongs to the user, to root or to whoever owns the
package is loaded, and only where nobody else can write to it. Where the cache is open to others, libraries lie in
~/.cache/megadpo.

Each is a plain C library without torch's or Python's headers: a compiler is all it takes, and without one the callers'
torch twins do the work. This file imports neither torch nor the rest of megadpo, since setup.py reads it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
SECONDS_TO_COMPILE = 600


@dataclass(frozen=True)
class Library:
    """A library of csrc/.

    Attributes:
        sources: files of csrc/; the first one is compiled, the others are included by it.
        flags: for the compiler.
        is_cuda: compiled by nvcc.
    """

    name: str
    sources: tuple[str, ...]
    flags: tuple[str, ...]
    is_cuda: bool = False


CXX_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=default", "-pthread", "-Wno-psabi")
NVCC_FLAGS = (
    "-std=c++17",
    "-O3",
    "-Xcompiler=-fPIC",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_90,code=compute_90",  # what newer devices make their own code of
)
LIBRARIES = {
    library.name: library
    for library in (
        Library("head", ("head.cpp", "head_rows.inc"), CXX_FLAGS),
        Library("head_cuda", ("head.cu",), NVCC_FLAGS, is_cuda=True),
    )
}


class Unavailable(Exception):
    """A library that this machine does not have and cannot make; the text says why, as a clause."""


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """The library of this name, ready to be called.

    Raises:
        Unavailable: no compiler, no sources, or they do not go together.
    """
    library = LIBRARIES[name]
    key = source_key(library)
    for path in PACKAGE.glob(f"_{name}.*so"):
        if not is_trusted(path, beside=Path(__file__)):
            continue
        with contextlib.suppress(OSError):  # made for another machine
            installed = ctypes.CDLL(str(path))
            if made_from(installed) == key:
                return installed
    path = built(library, key)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path} does not load: {error}") from error


def source_directory() -> Path:
    """csrc/: in the package where it is installed, beside the package in a checkout."""
    installed = PACKAGE / "csrc"
    return installed if installed.is_dir() else PACKAGE.parent / "csrc"


def source_key(library: Library) -> str:
    """A name for everything that decides what the compiled library does.

    Raises:
        Unavailable: the sources are missing.
    """
    hasher = hashlib.blake2b(f"{platform.system()} {platform.machine()} {library.flags}".encode(), digest_size=10)
    try:
        for source in library.sources:
            hasher.update((source_directory() / source).read_bytes())
    except OSError as error:
        raise Unavailable(f"{error.filename} is missing") from error
    return hasher.hexdigest()


def made_from(library: ctypes.CDLL) -> str:
    """The `source_key` of a loaded library; empty where it has none."""
    if not hasattr(library, "megadpo_source_key"):
        return ""
    library.megadpo_source_key.restype = ctypes.c_char_p
    return str(library.megadpo_source_key().decode())


def is_trusted(path: Path, beside: Path | None = None) -> bool:
    """Whether a file or directory belongs to this user or root, and nobody else can write to it.

    A directory that others can write to is trusted where they cannot replace what is not theirs (the sticky bit).

    Args:
        beside: code that runs in this process anyway: its owner, and the group that can write to it, are trusted as well.
    """
    try:
        about = os.stat(path, follow_symlinks=False)
        other = None if beside is None else os.stat(beside)
    except OSError:
        return False
    owners, open_to = {0, os.geteuid()}, about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if other is not None:
        owners.add(other.st_uid)
        if other.st_gid == about.st_gid:
            open_to &= ~other.st_mode
    if stat.S_ISDIR(about.st_mode) and about.st_mode & stat.S_ISVTX:
        open_to = 0
    return about.st_uid in owners and not open_to and not stat.S_ISLNK(about.st_mode)


def _cache() -> Path:
    """$MEGADPO_CACHE, unless others could exchange what lies there (they may share the rest); else ~/.cache/megadpo."""
    home = Path("~/.cache/megadpo").expanduser()
    chosen = Path(os.environ.get("MEGADPO_CACHE") or home).expanduser()
    chosen.mkdir(parents=True, exist_ok=True)
    return chosen if is_trusted(chosen) else home


def _own_directory(cache: Path) -> Path:
    """Where this user's libraries lie in a cache: `kernels`, or where that is somebody else's, one of this user's."""
    directory = cache / "kernels"
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    if os.stat(directory).st_uid == os.geteuid() and not is_trusted(directory):
        directory.chmod(0o755)  # of an earlier version, under a umask that lets the group write
    if is_trusted(directory) and os.access(directory, os.W_OK):
        return directory
    own = cache / f"kernels-{os.geteuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    return own


def built(library: Library, key: str) -> Path:
    """The compiled library in the cache ($MEGADPO_CACHE, else ~/.cache/megadpo), made now where it is not there.

    Any number of processes may ask at once: one compiles while the others wait, and where locks do not work (some network
    file systems) each compiles and the last one's file, equal to the others', stays.
    """
    name = f"{library.name}-{key}.so"
    try:
        cache = _cache()
        shared = cache / "kernels" / name
        if is_trusted(shared.parent) and is_trusted(shared):
            return shared
        compiler = find_compiler(library)
        directory = _own_directory(cache)
        path = directory / name
        if not is_trusted(directory):
            raise Unavailable(f"{directory} belongs to somebody else, or others can write to it")
        if os.path.lexists(path) and not is_trusted(path):
            path.unlink()
        with _locked(path.with_suffix(".lock")):
            if not path.is_file():
                with tempfile.TemporaryDirectory(dir=directory) as temporary:
                    partial = Path(temporary) / path.name
                    _compile(library, compiler, key, partial)
                    partial.chmod(0o755)
                    partial.replace(path)
    except OSError as error:
        raise Unavailable(f"{error.filename or 'the cache'} cannot be written: {error.strerror}") from error
    return path


def find_compiler(library: Library) -> str:
    """The path of $CXX, c++, g++ or clang++; for CUDA of nvcc.

    Raises:
        Unavailable: there is none.
    """
    if library.is_cuda:
        homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
        names = [*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    else:
        names = [*(os.environ.get("CXX", "").split()[:1]), "c++", "g++", "clang++"]
    for name in names:
        if found := shutil.which(name):
            return found
    raise Unavailable(f"there is no {'nvcc' if library.is_cuda else 'C++ compiler'}")


def definitions(key: str) -> list[str]:
    """Compiler arguments that tell the library what it was made from."""
    return [f'-DMEGADPO_SOURCE_KEY="{key}"']


def _compile(library: Library, compiler: str, key: str, to: Path) -> None:
    source = source_directory() / library.sources[0]
    command = [compiler, *library.flags, *definitions(key), "-shared", str(source), "-o", str(to)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_COMPILE)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{compiler} did not finish in {SECONDS_TO_COMPILE} seconds") from error
    if done.returncode != 0:
        raise Unavailable(f"{compiler} could not compile {source}: {_first_error(done.stderr.splitlines())}")


def _first_error(lines: Sequence[str]) -> str:
    return next((line for line in lines if "error" in line), lines[-1] if lines else "no message")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
