"""What this process is doing right now, told by the code that does it; the heartbeat and the live lines read it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

Item = TypeVar("Item")

SECONDS_BEFORE_ESTIMATE = 3.0
GIB = 2**30


@dataclass(eq=False)
class Activity:
    """Something that takes a while.

    Attributes:
        what: in words, as "tokenising".
        total: how much there is of it, where that is known.
        unit: of what is counted, as "rows"; "bytes" are shown as GiB.
        began: `time.monotonic()`.
        done: of the total.
    """

    what: str
    total: int | None = None
    unit: str = ""
    began: float = field(default_factory=time.monotonic)
    done: int = 0
    _first: tuple[float, int] | None = None

    def advance(self, count: int = 1) -> None:
        """So much more of it is done."""
        self.done += count
        if self._first is None:  # what came before, as processes that had to start, says nothing about the rest
            self._first = time.monotonic(), self.done

    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    def words(self) -> str:
        """As "tokenising: 12,000 of 30,000 rows, 8 s, about 12 s left"."""
        seconds = self.seconds()
        parts = [f"{self.what}: {self._amount()}" if self._amount() else self.what]
        if seconds >= 1:
            parts.append(duration(seconds))
        if (left := self._seconds_left()) is not None:
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts)

    def _seconds_left(self) -> float | None:
        """By what was done since the first of it was; None where that says too little."""
        if self._first is None or self.total is None or not self._first[1] < self.done < self.total:
            return None
        seconds, count = time.monotonic() - self._first[0], self.done - self._first[1]
        return None if seconds < SECONDS_BEFORE_ESTIMATE else seconds * (self.total - self.done) / count

    def _amount(self) -> str:
        if self.unit == "bytes":
            whole = f" of {self.total / GIB:.2f}" if self.total else ""
            return f"{self.done / GIB:.2f}{whole} GiB"
        if self.total is not None:
            return f"{self.done:,} of {self.total:,} {self.unit}".rstrip()
        return f"{self.done:,} {self.unit}".rstrip() if self.done else ""


def duration(seconds: float) -> str:
    """As "8 s", or "1:02:03" from two minutes on."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


_entered: list[Activity] = []
_base = Activity("at work")
_when_idle: list[Callable[[], None]] = []


def current() -> Activity:
    """The innermost activity under way, else what `begin` was last told."""
    entered = _entered[-1:]  # the heartbeat's thread reads while the main one writes
    return entered[0] if entered else _base


def is_under_way() -> bool:
    """Whether any activity is."""
    return bool(_entered)


def begin(what: str) -> None:
    """From now on this process does something else, where no activity is under way."""
    global _base
    _base = Activity(what)


@contextlib.contextmanager
def calling_when_idle(function: Callable[[], None]) -> Iterator[None]:
    """Within, `function` is called where the last activity has ended."""
    _when_idle.append(function)
    try:
        yield
    finally:
        _when_idle.remove(function)


@contextlib.contextmanager
def activity(what: str, total: int | None = None, unit: str = "") -> Iterator[Activity]:
    """Within, this is what the process is doing. Of threads besides the main one nothing is told.

    Args: as of `Activity`.
    """
    one = Activity(what, total, unit)
    if threading.current_thread() is not threading.main_thread():
        yield one
        return
    _entered.append(one)
    try:
        yield one
    finally:
        _entered.remove(one)
        if not _entered:
            for function in _when_idle:
                function()


def counted_through(items: Iterable[Item], what: str, total: int | None = None, unit: str = "") -> Iterator[Item]:
    """The items, while they are gone through as an activity; arguments as of `Activity`."""
    with activity(what, total, unit) as one:
        for item in items:
            yield item
            one.advance()
