"""What the next step reads, made ready on a thread while this one computes."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """``make(step)`` for one step after the other, each made while the one before it is in use.

    Everything is made on one thread, in order, and only by `make`: what comes out is what `make` gives, and an error of it
    is raised by `at`. A step that is asked for out of turn is made when it is asked for.

    Args:
        make: pure; must not communicate with other processes.
        num_steps: steps from this number on are never made ahead.

    Attributes:
        seconds_waited: how long the last `at` waited.
    """

    def __init__(self, make: Callable[[int], T], num_steps: int) -> None:
        self.seconds_waited = 0.0
        self._make, self._num_steps = make, num_steps
        self._pool = ThreadPoolExecutor(1, "megadpo-data")
        self._next: tuple[int, Future[T]] | None = None

    def at(self, step: int) -> T:
        """What `make` gives for the step; that of the next one is begun."""
        started = time.perf_counter()
        if self._next is None or self._next[0] != step:
            self._next = (step, self._pool.submit(self._make, step))
        value = self._next[1].result()
        self.seconds_waited = time.perf_counter() - started
        self._next = (step + 1, self._pool.submit(self._make, step + 1)) if step + 1 < self._num_steps else None
        return value

    def following(self) -> T:
        """What `make` gives for the step after the one last asked for, of which there must be one."""
        assert self._next is not None
        return self._next[1].result()

    def close(self) -> None:
        """Ends the thread; what it is making is made to its end and thrown away."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
