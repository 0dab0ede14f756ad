"""Prefetching: the next step's data is made on a thread while this step computes."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """``make(step)`` for one step after the other; step + 1 is made while step is in use.

    All calls of `make` are on one thread, in the order of the requests. An error that `make` raises for a step is raised
    by `get` of that step. A step that was not prefetched is made when it is requested.

    Args:
        make: from a step's number to its data; pure, and without communication between processes.
        num_steps: the first step that is never prefetched.

    Attributes:
        seconds_waited: how long the last `get` waited.
    """

    def __init__(self, make: Callable[[int], T], num_steps: int) -> None:
        self.seconds_waited = 0.0
        self._make, self._num_steps = make, num_steps
        self._pool = ThreadPoolExecutor(1, "megadpo-data")
        self._next: tuple[int, Future[T]] | None = None

    def get(self, step: int) -> T:
        """`make(step)`, waited for; starts prefetching the next step. Raises what `make` raises."""
        started = time.perf_counter()
        if self._next is None or self._next[0] != step:
            self._next = (step, self._pool.submit(self._make, step))
        value = self._next[1].result()
        self.seconds_waited = time.perf_counter() - started
        self._next = (step + 1, self._pool.submit(self._make, step + 1)) if step + 1 < self._num_steps else None
        return value

    def get_next(self) -> T:
        """`make(step + 1)` after `get(step)`, waited for; that step must be below `num_steps`."""
        assert self._next is not None
        return self._next[1].result()

    def close(self, at_once: bool = False) -> None:
        """End the thread: a call of `make` that is running is finished, which is waited for unless `at_once`."""
        self._pool.shutdown(wait=not at_once, cancel_futures=True)

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
