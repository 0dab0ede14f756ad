"""Where the time of a step goes: at any moment a step is in one part of `PARTS`, and each change of part is marked.

On a CPU a mark is the time; on CUDA an event on the stream, so that a part lasts as long as the device is in it, and nobody
waits for the device to know: `StepClock.seconds` adds up what lies between marks that have passed, and what has not goes
into the next sum. Megatron's schedules, gradient reductions and optimizer say through `TIMERS` where they are.

What cannot be told apart: collectives inside layers (tensor, context and expert parallelism) are part of forward and
backward, and so is what overlaps with these.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

PARTS = ("data", "reference", "forward", "backward", "communication", "optimizer")
_COMMUNICATION = ("recv", "send", "grads-sync", "grads-all-reduce", "params-all-gather")
"""What the names of Megatron's timers contain that are about messages."""

_current: StepClock | None = None


class StepClock:
    """The marks of this rank's steps."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: deque[tuple[str | None, Any]] = deque()
        self._stack: list[str] = []
        self._spare: list[Any] = []

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Within, a step is under way, at first in "data"."""
        global _current
        before, _current, self._stack = _current, self, ["data"]
        self._mark("data")
        try:
            yield
        finally:
            self._stack = []
            self._mark(None)
            _current = before

    def begin(self, part: str) -> None:
        """What the step does from now on is `part`, until its `end`. The forwards of a reference are the reference's."""
        if part not in ("communication", "data") and "reference" in self._stack:
            part = "reference"
        self._stack.append(part)
        self._mark(part)

    def end(self) -> None:
        """The part that was begun last is over."""
        self._stack.pop()
        self._mark(self._stack[-1])

    def seconds(self) -> dict[str, float]:
        """Seconds of each part since the last call, of what has passed on the device; waits for nothing."""
        found = dict.fromkeys(PARTS, 0.0)
        while len(self._marks) > 1 and self._has_passed(self._marks[1][1]):
            part, mark = self._marks.popleft()
            if part is not None:
                found[part] += self._between(mark, self._marks[0][1])
            if self._is_cuda:
                self._spare.append(mark)
        return found

    def _mark(self, part: str | None) -> None:
        if self._marks and self._marks[-1][0] == part:
            return
        if self._is_cuda:
            event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))
        else:
            self._marks.append((part, time.perf_counter()))

    def _has_passed(self, mark: Any) -> bool:
        return bool(mark.query()) if self._is_cuda else True

    def _between(self, mark: Any, other: Any) -> float:
        return float(mark.elapsed_time(other) / 1000) if self._is_cuda else other - mark


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Within, the step under way does `name`; nothing where none is measured."""
    clock = _current
    if clock is None:
        yield
        return
    clock.begin(name)
    try:
        yield
    finally:
        if clock is _current and len(clock._stack) > 1:
            clock.end()


class _Timer:
    """One of Megatron's timers by name: begins and ends a part of the step that is measured, if there is one."""

    def __init__(self, part: str | None) -> None:
        self._part = part

    def start(self, barrier: bool = False) -> None:
        if self._part is not None and _current is not None:
            _current.begin(self._part)

    def stop(self, barrier: bool = False) -> None:
        if self._part is not None and _current is not None:
            _current.end()


class Timers:
    """What Megatron calls as ``config.timers(name, log_level=…).start()`` and ``config.timers(name).stop()``."""

    def __init__(self) -> None:
        self._timers: dict[str, _Timer] = {}

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        timer = self._timers.get(name)
        if timer is None:
            timer = self._timers[name] = _Timer(_part_of(name))
        return timer


def _part_of(name: str) -> str | None:
    if name in ("forward-compute", "backward-compute"):
        return name.partition("-")[0]
    return "communication" if any(word in name for word in _COMMUNICATION) else None


TIMERS = Timers()
"""For the `timers` of Megatron's configurations."""
