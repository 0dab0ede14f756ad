"""Real multi-process gloo worlds for tests: a function runs on every rank, its results come back by rank.

Processes are forked from a server that has imported the heavy libraries and computed nothing, so that a world starts in
a fraction of a second; those of a world that ended well are ranks of later worlds, which is faster still.
"""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megadpo.launch.supervisor import free_port

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.helpers.preload"])


def forked(function: Callable[..., Any], *arguments: Any) -> Any:
    """A process of its own, forked from the server, that has begun `function(*arguments)`."""
    process = _context.Process(target=function, args=arguments)
    process.start()
    return process


def pipe() -> tuple[Any, Any]:
    """Both ends of a pipe, of which one can be given to a forked process."""
    return _context.Pipe()


class _Rank:
    """A process that does what it is sent, one world after the other."""

    def __init__(self) -> None:
        self.pipe, its = _context.Pipe()
        self.process = _context.Process(target=_serve, args=(its,), daemon=True)
        self.process.start()
        its.close()

    def end(self) -> None:
        """One that waits for work ends by itself; what does not is in a world that has failed."""
        self.pipe.close()
        self.process.join(timeout=1)
        if self.process.is_alive():
            self.process.kill()


MOST_THREADS = 24
"""Of a process that is used again: what has left more behind would take the others' time."""

_idle: list[_Rank] = []
_is_reusable = True


def this_process_is_not_used_again() -> None:
    """For what leaves its process as no run leaves it; it ends with its world."""
    global _is_reusable
    _is_reusable = False


def run_world(
    num_processes: int, function: Callable[..., Any], *arguments: Any, timeout: float = 600, new: bool = False
) -> list[Any]:
    """Run `function(*arguments)` on `num_processes` ranks with torchrun's environment; results in rank order.

    `function` must be importable (a module's function); arguments and results must pickle.

    Args:
        timeout: seconds.
        new: in processes that have run nothing and run nothing afterwards, as where their memory is measured or one breaks
            off; others are ranks of many worlds.
    """
    for _ in range(3):
        answers, failure = _run_world(num_processes, function, arguments, timeout, new)
        if failure is None or not any(words in failure for words in ("EADDRINUSE", "Address already in use")):
            break  # else the port was free a moment ago
    assert failure is None, failure
    return [answers[rank] for rank in range(num_processes)]


def _run_world(
    num_processes: int, function: Callable[..., Any], arguments: Any, timeout: float, new: bool
) -> tuple[dict[int, Any], str | None]:
    """Answers by rank, and what the first rank to fail said."""
    ranks = [_Rank() if new else _idle_rank() for _ in range(num_processes)]
    port, work = free_port(), _as_bytes((function, arguments))
    for number, rank in enumerate(ranks):
        rank.pipe.send((number, num_processes, port, os.getcwd(), list(sys.path), work))
    deadline = time.monotonic() + timeout
    waiting = dict(enumerate(ranks))
    answers: dict[int, Any] = {}
    failure, ended = None, None
    while waiting and failure is None:
        ready = multiprocessing.connection.wait([rank.pipe for rank in waiting.values()], deadline - time.monotonic())
        if not ready:
            failure = f"ranks {sorted(waiting)} of {num_processes} gave no answer within {timeout:.0f} s"
        for number in [number for number, rank in waiting.items() if rank.pipe in ready]:
            try:
                error, answer, is_clean = waiting.pop(number).pipe.recv()
            except (EOFError, ConnectionError):  # the others may have more to say
                ended = ended or f"rank {number} of {num_processes} failed: its process ended"
                continue
            answers[number] = answer and pickle.loads(answer)  # noqa: S301 - from our own child process
            new = new or not is_clean
            failure = failure or (error and f"rank {number} of {num_processes} failed:\n{error}")
    failure = failure or ended
    if failure or new:
        for rank in ranks:
            rank.end()
    else:
        _idle.extend(ranks)
    return answers, failure


def _idle_rank() -> _Rank:
    while _idle:
        rank = _idle.pop()
        if rank.process.is_alive():
            return rank
    return _Rank()


def _serve(work: Any) -> None:
    """What a rank does until nobody can send it anything."""
    from tests.helpers.process_state import ProcessState

    begun = ProcessState.now()
    with contextlib.suppress(EOFError):
        while True:
            rank, size, port, directory, path, function_and_arguments = work.recv()
            begun.restore()
            os.chdir(directory)
            sys.path[:] = path
            os.environ.update(
                RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
            )
            try:
                function, arguments = pickle.loads(function_and_arguments)  # noqa: S301 - from our own parent process
                answer = _as_bytes(function(*arguments))
                del function, arguments
                is_clean = _is_as_it_was(begun)
                work.send((None, answer, is_clean))
            except BaseException:
                is_clean = False
                work.send((traceback.format_exc(), None, False))
            if not is_clean:
                return  # now: its connections end with it, for which others may wait


def _is_as_it_was(begun: Any) -> bool:
    """Whether this process may be a rank of another world; frees what the last one has left."""
    import torch

    gc.collect()  # groups go with what refers to them in circles, each with threads that wake 100 times a second
    for thread in threading.enumerate():
        if thread.name == "left process groups":
            thread.join()
    tasks = Path("/proc/self/task")  # Linux's
    num_threads = len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()
    is_over = _is_reusable and not torch.distributed.is_initialized() and num_threads <= MOST_THREADS
    return is_over and begun.has_modules_as_they_were()


def _as_bytes(value: Any) -> bytes:
    """The value pickled, for torch would share the memory of tensors, which goes when this process does; and plain tensors
    as arrays, which is done in a tenth of the time."""
    import torch

    class Pickler(pickle.Pickler):
        def reducer_override(self, item: Any) -> Any:
            is_plain = type(item) is torch.Tensor and item.device.type == "cpu" and not item.requires_grad
            if not is_plain or item.layout != torch.strided or item.dtype == torch.bfloat16:
                return NotImplemented
            return torch.from_numpy, (item.numpy(),)

    written = io.BytesIO()
    Pickler(written, pickle.HIGHEST_PROTOCOL).dump(value)
    return written.getvalue()


def path_with_mpirun(directory: Path, kind: str) -> str:
    """PATH in which `mpirun` is the one of this kind; skips where there is none (Debian gives both their own names)."""
    program = shutil.which(f"mpirun.{kind}") or shutil.which("mpirun")
    answer = subprocess.run([program, "--version"], capture_output=True, text=True).stdout if program else ""
    names = {"openmpi": ("Open MPI", "OpenRTE", "PRRTE"), "mpich": ("HYDRA",)}[kind]
    if not any(name in answer for name in names):
        pytest.skip(f"there is no mpirun of {kind} here")
    (directory / "bin").mkdir()
    (directory / "bin" / "mpirun").write_text(f'#!/bin/sh\nexec {program} "$@"\n')
    (directory / "bin" / "mpirun").chmod(0o755)
    return f"{directory / 'bin'}{os.pathsep}{os.environ['PATH']}"
