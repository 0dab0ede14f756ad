"""Several processes of one world on this machine, forked from one that has imported libraries and computed nothing."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any


def on_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` gives on each rank, in the order of the ranks; RANK and its kin are set.

    Raises:
        SystemExit: a rank failed; it has printed why.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.preload"])
    results: Any = context.SimpleQueue()
    processes = [
        context.Process(target=_rank, args=(rank, num_ranks, port, results, function, arguments))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    found = []
    while len(found) < num_ranks and not any(process.exitcode for process in processes):
        processes[0].join(0.05)
        while not results.empty():
            found.append(results.get())
    if len(found) < num_ranks:
        for process in processes:
            process.kill()
        raise SystemExit("a rank failed: its own error is above")
    for process in processes:
        process.join()
    return [value for _, value in sorted(found, key=lambda one: one[0])]


def _rank(rank: int, num_ranks: int, port: int, results: Any, function: Callable[..., Any], arguments: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    results.put((rank, function(*arguments)))
