"""Real multi-process gloo worlds for tests: a function runs on every rank, its results come back by rank.

Processes are forked from a server that has imported the heavy libraries and computed nothing, so that a world starts in
a fraction of a second.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import shutil
import subprocess
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


def run_world(num_processes: int, function: Callable[..., Any], *arguments: Any, timeout: float = 600) -> list[Any]:
    """Run `function(*arguments)` on `num_processes` ranks with torchrun's environment; results in rank order.

    `function` must be importable (a module's function); arguments and results must pickle.
    """
    for _ in range(3):
        answers, failure = _run_world(num_processes, function, arguments, timeout)
        if failure is None or not any(words in failure for words in ("EADDRINUSE", "Address already in use")):
            break  # else the port was free a moment ago
    assert failure is None, failure
    return [answers[rank] for rank in range(num_processes)]


def _run_world(
    num_processes: int, function: Callable[..., Any], arguments: Any, timeout: float
) -> tuple[dict[int, Any], str | None]:
    """Answers by rank, and what the first rank to fail said."""
    port = free_port()
    results: Any = _context.Queue()
    processes = [
        _context.Process(target=_rank_main, args=(rank, num_processes, port, results, function, arguments), daemon=True)
        for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    answers: dict[int, Any] = {}
    failure = None
    try:
        while len(answers) < num_processes and failure is None:
            rank, error, answer = results.get(timeout=timeout)
            if error is not None:
                failure = f"rank {rank} of {num_processes} failed:\n{error}"
            else:
                answers[rank] = pickle.loads(answer)  # noqa: S301 - from our own child process
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
    return answers, failure


def _rank_main(rank: int, size: int, port: int, results: Any, function: Callable[..., Any], arguments: Any) -> None:
    import torch

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    try:
        results.put((rank, None, _as_bytes(function(*arguments))))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))


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
