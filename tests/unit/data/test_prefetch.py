"""What the next step reads is made on a thread: the same as without, errors and all, and no thread is left."""

from __future__ import annotations

import threading
import time

import pytest

from megadpo.data.batches.prefetch import Prefetcher
from megadpo.errors import UserError


def _data_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("megadpo-data")]


def test_every_step_gets_its_own_in_whatever_order_they_are_asked_for() -> None:
    with Prefetcher(lambda step: step * step, 10) as ahead:
        assert [ahead.get(step) for step in (0, 1, 2, 5, 6, 6, 3, 9, 0)] == [0, 1, 4, 25, 36, 36, 9, 81, 0]
    assert not _data_threads()


def test_the_next_step_is_made_while_this_one_is_in_use_and_none_beyond_the_last() -> None:
    made: list[int] = []
    is_made = threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if step == 1:
            is_made.set()
        return step

    with Prefetcher(make, 2) as ahead:
        ahead.get(0)
        assert is_made.wait(10), "without anybody asking for it"
        ahead.get(1)
    assert made == [0, 1]


def test_what_was_waited_for_is_measured() -> None:
    started, may_end = threading.Event(), threading.Event()

    def make(step: int) -> int:
        started.set()
        may_end.wait(10)
        return step

    with Prefetcher(make, 1) as ahead:
        threading.Thread(target=lambda: (started.wait(10), time.sleep(0.05), may_end.set())).start()
        ahead.get(0)
        assert ahead.seconds_waited >= 0.05
        ahead.get(0)
        assert ahead.seconds_waited < 10


def test_an_error_is_raised_where_its_step_is_asked_for() -> None:
    def make(step: int) -> int:
        if step == 1:
            raise UserError("row 7 is wrong")
        return step

    with Prefetcher(make, 3) as ahead:
        assert ahead.get(0) == 0
        with pytest.raises(UserError, match="row 7 is wrong"):
            ahead.get(1)
    assert not _data_threads()


def test_closing_at_once_does_not_wait_for_rows_that_do_not_come() -> None:
    may_end = threading.Event()
    ahead = Prefetcher(lambda step: step or None if step == 0 else may_end.wait(30), 2)
    ahead.get(0)
    started = time.monotonic()
    ahead.close(at_once=True)
    assert time.monotonic() - started < 5 and _data_threads()
    may_end.set()
    while _data_threads() and time.monotonic() - started < 10:
        time.sleep(0.01)
    assert not _data_threads()


def test_leaving_early_leaves_no_thread() -> None:
    with pytest.raises(KeyboardInterrupt), Prefetcher(lambda step: time.sleep(0.01), 100) as ahead:
        ahead.get(0)
        raise KeyboardInterrupt
    assert not _data_threads()
