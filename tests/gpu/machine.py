"""Processes that see the GPU, or do not, and stay warm: a case after the other runs in the same ones.

What a process does for the first time is what takes long: importing torch and Megatron-core, a CUDA context, kernels that
are compiled. So each pytest process keeps one process a device, and one more for each further rank of a world on one card. A
case runs there as a rank of a world of its own, with a port of its own; what the world made is undone as a run undoes it
(`megadpo.parallel.world`). Where a case fails, dies or takes too long, its processes end, and the next one gets new ones.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

_context = multiprocessing.get_context("spawn")  # a fork of a process that has asked for CUDA cannot use it

_warm: dict[tuple[str, int], _Process] = {}
"""By device and rank."""


def on(
    device: str,
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float = 300,
    num_ranks: int = 1,
    in_new_processes: bool = False,
) -> Any:
    """`function(*arguments)` on "cuda" or "cpu", as every rank of a world; what it gives on rank 0.

    Args:
        function: must be importable; arguments and results must pickle.
        timeout: seconds, importing included.
        num_ranks: all of them on the one device.
        in_new_processes: for a case that needs processes in which nothing has run, and which nothing runs in afterwards.
    """
    try:
        return _on(device, function, arguments, timeout, num_ranks, in_new_processes)
    except AssertionError as error:
        if "EADDRINUSE" not in str(error):  # the port was free a moment ago
            raise
    return _on(device, function, arguments, timeout, num_ranks, in_new_processes)


def _on(
    device: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    timeout: float,
    num_ranks: int,
    in_new_processes: bool,
) -> Any:
    keys = [(device, rank) for rank in range(num_ranks)]
    if in_new_processes:
        _end(keys)
    processes = [_warm.get(key) or _started(key) for key in keys]
    port, deadline = _free_port(), time.monotonic() + timeout
    try:
        for (_, rank), process in zip(keys, processes, strict=True):
            world = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(num_ranks)}
            process.ask({**world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}, function, arguments)
        answers = [process.answer(deadline) for process in processes]
    except BaseException:
        _end(keys)
        raise
    if in_new_processes:
        _end(keys)
    return answers[0]


class _Process:
    """One that answers what it is asked, in order, until a case fails in it."""

    def __init__(self, device: str, rank: int) -> None:
        self.connection, theirs = _context.Pipe()
        self.name = f"rank {rank} on {device}"
        self.process = _context.Process(target=_serve, args=(device, theirs), daemon=True)
        with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}):
            self.process.start()
        theirs.close()

    def ask(self, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.connection.send((environment, pickle.dumps((function, arguments))))

    def answer(self, deadline: float) -> Any:
        assert self.connection.poll(max(0.0, deadline - time.monotonic())), f"{self.name} gave no answer in time"
        try:
            error, answer = self.connection.recv()
        except EOFError:
            raise AssertionError(f"{self.name} ended without an answer") from None
        assert error is None, f"{self.name}:\n{error}"
        return pickle.loads(answer)  # noqa: S301 - from our own child process

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


def _started(key: tuple[str, int]) -> _Process:
    _warm[key] = _Process(*key)
    return _warm[key]


@atexit.register
def _end_all() -> None:
    _end(list(_warm))


def _end(keys: list[tuple[str, int]]) -> None:
    for key in keys:
        process = _warm.pop(key, None)
        if process is not None:
            process.end()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(device: str, connection: Any) -> None:
    """Answer until the other end closes or a case fails."""
    try:
        import torch

        assert torch.cuda.is_available() == (device == "cuda"), f"this process is to run on {device}"
        torch.set_num_threads(1)  # there are as many processes as cores
        while True:
            environment, case = connection.recv()
            os.environ.update(environment)
            function, arguments = pickle.loads(case)  # noqa: S301 - from our own parent
            # As bytes: torch would share the memory of tensors, which goes when this process does.
            answer = pickle.dumps(function(*arguments))
            _tidy()
            connection.send((None, answer))
    except EOFError:
        return
    except BaseException:
        connection.send((traceback.format_exc(), None))


def _tidy() -> None:
    """Nothing of a world is left for the next one: no process group, no store, no memory."""
    import gc

    import torch
    import torch.distributed as dist

    from megadpo.parallel import world

    if dist.is_initialized():
        dist.destroy_process_group()
    world._rendezvous.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
