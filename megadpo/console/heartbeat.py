"""A thread that speaks where nothing was said for a while: what is going on, and for how long.

On a terminal it draws a line that goes again; elsewhere it prints lines. Of several processes only rank 0 speaks.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from megadpo.console.activity import calling_when_idle, current, is_under_way
from megadpo.console.terminal import can_draw, draw_once, start_live
from megadpo.secrets.redact import redact

if TYPE_CHECKING:
    from rich.live import Live

FIRST_SECONDS = 0.6
"""Until the first line of a command that has said nothing by itself: what it takes to start Python is before that."""
SECONDS_OF_SILENCE = 1.2
"""Before the first step: with the time that a busy machine takes to wake a thread, less than two seconds."""
SECONDS_OF_SILENCE_IN_STEPS = 10.0
"""From the first step on, within one step, evaluation or save."""
SECONDS_BEFORE_DRAWING = 0.4
"""On a terminal what is over sooner is not shown."""
INTERVAL = 0.1


class Heartbeat:
    """The thread, while a command or a run is under way.

    Args:
        stream: where to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._draws = can_draw(stream)
        self._live: Live | None = None
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="megadpo-heartbeat", daemon=True)
        self.silent_since = time.monotonic() - SECONDS_OF_SILENCE + FIRST_SECONDS
        self.is_steady = False
        self.is_lent = False

    def start(self) -> None:
        if self._draws:
            draw_once()  # while the thread draws, the main one imports; two that import at once may wait for each other
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self.clear()

    def clear(self) -> None:
        """Take away the line that is drawn."""
        with self._lock:
            if self._live is not None:
                self._live.stop()
                self._live = None

    def lend(self) -> None:
        """Somebody else draws on the terminal, or speaks, from now on."""
        with self._lock:
            self.clear()
            self.is_lent = True

    def _beat(self) -> None:
        while not self._closing.wait(INTERVAL):
            # A terminal that is gone, a stream that is closed: there is nobody to speak to.
            with contextlib.suppress(OSError, ValueError), self._lock:
                if not self.is_lent and is_rank_0():
                    self._draw() if self._draws else self._speak()

    def _speak(self) -> None:
        now, one = time.monotonic(), current()
        if self.is_steady:
            is_due = min(now - self.silent_since, one.seconds()) >= SECONDS_OF_SILENCE_IN_STEPS
        else:
            is_due = now - self.silent_since >= SECONDS_OF_SILENCE
        if is_due:
            write_line(one.words(), self._stream)

    def _draw(self) -> None:
        if self._live is None and is_under_way() and current().seconds() >= SECONDS_BEFORE_DRAWING:
            from rich.text import Text

            self._live = start_live(
                self._stream, lambda: Text(f"megadpo: {redact(current().words())} …", style="dim"), 4, transient=True
            )


_heart: Heartbeat | None = None


@contextlib.contextmanager
def speaking(stream: TextIO | None = None) -> Iterator[None]:
    """Within, no silence is long. Only the outermost of several counts.

    Args:
        stream: where to; None: stderr.
    """
    global _heart
    if _heart is not None:
        yield
        return
    heart = _heart = Heartbeat(sys.stderr if stream is None else stream)
    heart.start()
    try:
        with calling_when_idle(heart.clear):
            yield
    finally:
        _heart = None
        heart.close()


def write_line(line: str, stream: TextIO | None = None) -> None:
    """A line for the user, with its secrets hidden; in one piece, whatever other threads print."""
    print(f"megadpo: {redact(line)}\n", end="", file=sys.stderr if stream is None else stream, flush=True)
    said()


def is_rank_0() -> bool:
    """Whether this process speaks for a run's; before its processes are joined."""
    return os.environ.get("RANK", "0") == "0"


def said() -> None:
    """Something was told to the user."""
    if _heart is not None:
        _heart.silent_since = time.monotonic()


def steady() -> None:
    """The first step is done: from now on every step's record says that all is well."""
    if _heart is not None:
        _heart.is_steady = True


def lend() -> None:
    """Others draw or speak from now on: live lines of training, the processes that this one has started."""
    if _heart is not None:
        _heart.lend()


def take_back() -> None:
    """They do so no longer."""
    if _heart is not None:
        _heart.is_lent = False
        said()


def _forget() -> None:
    """A process that was forked has no such thread."""
    global _heart
    _heart = None


os.register_at_fork(after_in_child=_forget)
