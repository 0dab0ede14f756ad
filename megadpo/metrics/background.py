"""A tracker on a thread of its own: whatever it does, raises or waits for, the run goes on at its own speed.

Records wait in a queue of bounded length. The first exception ends the tracker; at the run's end it is given some seconds.
Each trouble is told once, as a warning.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from megadpo.errors import reason
from megadpo.launch.worker import leave_threads_behind

Record = Mapping[str, float | int]

MOST_WAITING_RECORDS = 1000
SECONDS_TO_CLOSE = 30.0
"""That all trackers have at the run's end to hand on what they have."""
SECONDS_TO_CLOSE_FAILED = 3.0
"""At most, of a run that has failed: less than the launcher's SECONDS_TO_STOP, after which it kills this process."""


class Tracker(Protocol):
    """A run in an experiment tracker, opened already."""

    def write(self, record: Record) -> None:
        """Takes one record; it has a `step`."""

    def close(self, has_failed: bool) -> None:
        """Ends the run there, as finished or as failed."""


class BackgroundSink:
    """See `sinks.Sink`; no method raises, and only `close` waits.

    Args:
        name: of the tracker, for warnings.
        open_tracker: called on the thread.
        warn: shows the user a line, from any thread.
    """

    def __init__(
        self,
        name: str,
        open_tracker: Callable[[], Tracker],
        warn: Callable[[str], None],
        most_waiting: int = MOST_WAITING_RECORDS,
        seconds_to_close: float | None = None,
    ) -> None:
        """No `seconds_to_close`: `SECONDS_TO_CLOSE`."""
        self._name, self._open, self._warn = name, open_tracker, warn
        self._seconds = SECONDS_TO_CLOSE if seconds_to_close is None else seconds_to_close
        self._waiting: queue.Queue[Record | bool] = queue.Queue(most_waiting)
        self._has_ended = False
        self._is_behind = False
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._run, name=f"megadpo-{name}", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        """Hands a record to the thread, or leaves it out where too many wait."""
        if self._has_ended:
            return
        try:
            self._waiting.put_nowait(dict(record))
        except queue.Full:
            if not self._is_behind:
                self._is_behind = True
                self._tell(f"{self._name} does not keep up with the run: records that it has no room for are left out there")

    def begin_close(self, has_failed: bool = False) -> None:
        """No record comes any more; does not wait, so that several trackers end at the same time."""
        if self._deadline is None:
            self._deadline = time.monotonic() + (
                min(self._seconds, SECONDS_TO_CLOSE_FAILED) if has_failed else self._seconds
            )
            try:
                self._waiting.put_nowait(has_failed)
            except queue.Full:  # whoever does not keep up is not waited for
                self._deadline = time.monotonic()

    def close(self, has_failed: bool = False) -> None:
        """Waits for what the tracker still has, up to a limit."""
        self.begin_close(has_failed)
        assert self._deadline is not None
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        if self._thread.is_alive():
            self._has_ended = True
            leave_threads_behind()
            self._tell(f"{self._name} has not ended in time: what it had not handed on is missing there")

    def _run(self) -> None:
        try:
            tracker = self._open()
            while not self._has_ended:
                item = self._waiting.get()
                if isinstance(item, bool):
                    tracker.close(item)
                    return
                tracker.write(item)
        except BaseException as error:  # a library may also call sys.exit
            if not self._has_ended:
                self._tell(f"{self._name} has failed ({reason(error)}): the run goes on without it")
        finally:
            self._has_ended = True

    def _tell(self, problem: str) -> None:
        self._warn(f"warning: {problem}; metrics.jsonl has everything")
