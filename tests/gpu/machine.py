"""A fresh process that sees the GPU, or does not: functions run there as the only rank of a world."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

_context = multiprocessing.get_context("spawn")  # a fork of a process that has asked for CUDA cannot use it


def on(device: str, function: Callable[..., Any], *arguments: Any, timeout: float = 300) -> Any:
    """`function(*arguments)` on "cuda" or "cpu"; `function` must be importable, arguments and result must pickle."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    receiver, sender = _context.Pipe(duplex=False)
    process = _context.Process(target=_run, args=(device, sender, function, arguments), daemon=True)
    with mock.patch.dict(os.environ, environment):
        process.start()
    sender.close()
    try:
        assert receiver.poll(timeout), f"no answer within {timeout} seconds"
        error, answer = receiver.recv()
    except EOFError:
        raise AssertionError("the process ended without an answer") from None
    finally:
        process.join(timeout=10)
        if process.is_alive():
            process.kill()
    assert error is None, error
    return pickle.loads(answer)  # noqa: S301 - from our own child process


def _run(device: str, sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    try:
        assert torch.cuda.is_available() == (device == "cuda"), f"this process is to run on {device}"
        sender.send((None, pickle.dumps(function(*arguments))))
    except BaseException:
        sender.send((traceback.format_exc(), None))
