"""How a run ends, in exit statuses, and the signals that ask it to end.

SIGTERM and SIGUSR1 come from schedulers that want the machine back: the run is preempted. SIGINT comes from Ctrl-C: it is
interrupted. Until the first step there is nothing to save, and the process leaves at once (`leaving_at_once`). From then on
a signal is only noted (`noting`): the training loop finishes its step, saves and leaves. A second SIGINT ends the process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: try again later."""
EXIT_INTERRUPTED = 130

STATUS_OF_SIGNAL = {
    signal.SIGTERM: EXIT_PREEMPTED,
    signal.SIGUSR1: EXIT_PREEMPTED,
    signal.SIGINT: EXIT_INTERRUPTED,
}
"""The exit status that answers each signal that asks for an end."""
WORDS = {EXIT_PREEMPTED: "preempted", EXIT_INTERRUPTED: "interrupted"}


SECONDS_OF_ONE_CTRL_C = 2.0
"""A rank may hear one Ctrl-C twice: from the terminal, and from the launcher that hands it on."""


class Stopped(SystemExit):
    """The process was asked to end before its work was done, and does so now; nobody has to handle it.

    Args:
        status: the exit status, which says why.
        is_told: the user has been told.
    """

    def __init__(self, status: int, is_told: bool = False) -> None:
        super().__init__(status)
        self.status, self.is_told = status, is_told


@dataclass
class Request:
    """What the signals so far have asked for.

    Attributes:
        status: the exit status that answers the first of them; None: none has come.
        num_interrupts: how many SIGINT have come.
        interrupted: `time.monotonic()` of the first of them.
        is_deferred: a signal is noted; until this is set it ends the process as in `leaving_at_once`.
    """

    status: int | None = None
    num_interrupts: int = 0
    interrupted: float = 0.0
    is_deferred: bool = False


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Within, SIGTERM and SIGUSR1 raise Stopped wherever the process is, as SIGINT raises KeyboardInterrupt."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise Stopped(STATUS_OF_SIGNAL[signal.Signals(number)])

    with _handled((signal.SIGTERM, signal.SIGUSR1), leave):
        yield


@contextlib.contextmanager
def noting(heard: Callable[[signal.Signals], None] | None = None) -> Iterator[Request]:
    """Within, signals that ask for an end are only noted, once the request that this yields `is_deferred`.

    The second SIGINT raises KeyboardInterrupt.

    Args:
        heard: called with the first signal that is noted, inside its handler: it may not print through Python's streams.
    """
    request = Request()

    def note(number: int, frame: FrameType | None) -> None:
        which = signal.Signals(number)
        if which == signal.SIGINT:
            if (
                request.num_interrupts
                and "RANK" in os.environ
                and time.monotonic() < request.interrupted + SECONDS_OF_ONE_CTRL_C
            ):
                return
            request.interrupted = request.interrupted or time.monotonic()
            request.num_interrupts += 1
        if request.num_interrupts > 1 or (which == signal.SIGINT and not request.is_deferred):
            raise KeyboardInterrupt
        if not request.is_deferred:
            raise Stopped(STATUS_OF_SIGNAL[which])
        if request.status is None:
            request.status = STATUS_OF_SIGNAL[which]
            if heard is not None:
                heard(which)

    with _handled(tuple(STATUS_OF_SIGNAL), note):
        yield request


@contextlib.contextmanager
def _handled(numbers: tuple[signal.Signals, ...], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """`handler` for these signals, in this process alone; afterwards what there was before.

    Nothing happens outside of the main thread, where Python takes no handlers. A signal that the process was started to
    ignore (SIGINT, of a shell's background job) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a process forked from this one, which has other work
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        handler(number, frame)

    before: dict[signal.Signals, Any] = {}
    try:
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handle)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
