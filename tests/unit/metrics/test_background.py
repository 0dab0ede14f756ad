"""A tracker may raise, hang or be slow: the run is told once, and waits for nothing but the end, and for that not long."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from megadpo.launch import worker
from megadpo.launch.supervisor import SECONDS_TO_STOP
from megadpo.metrics import background
from megadpo.metrics.background import BackgroundSink

TOKEN = "hf_abcdefghijklmnopqrstuvwxyzabcdefgh"


class Listed:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.records: list[Any] = []
        self.has_failed: bool | None = None

    def write(self, record: Any) -> None:
        self.records.append(record)

    def close(self, has_failed: bool) -> None:
        self.has_failed = has_failed


@pytest.fixture(autouse=True)
def no_hung_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_has_hung_threads", False)


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """What hangs here goes on when the test is over."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("has_failed", [False, True])
def test_records_arrive_in_order_and_how_the_run_ended(has_failed: bool) -> None:
    tracker, told = Listed(), list[str]()
    sink = BackgroundSink("mine", lambda: tracker, told.append)
    for step in range(50):
        sink.write({"step": step})
    sink.close(has_failed)
    assert [record["step"] for record in tracker.records] == list(range(50))
    assert tracker.has_failed is has_failed and not told and not worker.has_hung_threads()


@pytest.mark.parametrize("where", ["open", "write", "close"])
def test_what_it_raises_is_told_once_without_secrets_and_ends_it_alone(where: str) -> None:
    def fail() -> None:
        if where == "write":
            raise SystemExit(f"no, with {TOKEN}")
        raise OSError(f"no, with {TOKEN}")

    class Failing(Listed):
        def write(self, record: Any) -> None:
            if where == "write":
                fail()

        def close(self, has_failed: bool) -> None:
            fail()

    def open_tracker() -> Failing:
        if where == "open":
            fail()
        return Failing()

    told: list[str] = []
    sink = BackgroundSink("mine", open_tracker, told.append)
    for step in range(5):
        sink.write({"step": step})
        time.sleep(0.01)
    sink.close()
    assert told == ["warning: mine has failed (no, with ***): the run goes on without it; metrics.jsonl has everything"]


@pytest.mark.parametrize("where", ["open", "write", "close"])
def test_one_that_hangs_keeps_neither_a_step_nor_the_end_waiting(released: threading.Event, where: str) -> None:
    class Hanging(Listed):
        def write(self, record: Any) -> None:
            if where == "write":
                released.wait()

        def close(self, has_failed: bool) -> None:
            released.wait()

    def open_tracker() -> Hanging:
        if where == "open":
            released.wait()
        return Hanging()

    told: list[str] = []
    sink = BackgroundSink("mine", open_tracker, told.append, most_waiting=20, seconds_to_close=0.2)
    started = time.monotonic()
    for step in range(10):
        sink.write({"step": step})
    written = time.monotonic()
    sink.close()
    assert written - started < 0.15 and time.monotonic() - written < 2
    assert told == [
        "warning: mine has not ended in time: what it had not handed on is missing there; metrics.jsonl has everything"
    ]
    assert worker.has_hung_threads(), "the command's end does not wait for it either"


def test_one_that_does_not_keep_up_loses_records_and_is_not_waited_for(released: threading.Event) -> None:
    class Slow(Listed):
        def write(self, record: Any) -> None:
            released.wait()

    told: list[str] = []
    sink = BackgroundSink("mine", Slow, told.append, most_waiting=4, seconds_to_close=60)
    for step in range(100):
        sink.write({"step": step})
    started = time.monotonic()
    sink.close()
    assert time.monotonic() - started < 2 and len(told) == 2 and "does not keep up" in told[0]


def test_several_that_hang_are_waited_for_together(released: threading.Event) -> None:
    from megadpo.metrics.sinks import close_all

    class Hanging(Listed):
        def close(self, has_failed: bool) -> None:
            released.wait()

    sinks = [BackgroundSink(str(n), Hanging, lambda line: None, seconds_to_close=0.5) for n in range(4)]
    started = time.monotonic()
    assert list(close_all(sinks, False)) == []
    assert time.monotonic() - started < 1.5


def test_a_failed_run_waits_less_than_its_launcher_does(released: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging(Listed):
        def close(self, has_failed: bool) -> None:
            released.wait()

    assert background.SECONDS_TO_CLOSE_FAILED < SECONDS_TO_STOP - 1
    monkeypatch.setattr(background, "SECONDS_TO_CLOSE_FAILED", 0.2)
    sink = BackgroundSink("mine", Hanging, lambda line: None, seconds_to_close=60)
    started = time.monotonic()
    sink.close(has_failed=True)
    assert time.monotonic() - started < 2


def test_a_command_ends_at_once_where_a_library_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    from megadpo import cli

    left: list[int] = []
    monkeypatch.setattr(cli, "run_as_one", lambda main: 0)
    monkeypatch.setattr(cli, "leave_now", left.append)
    for hangs, expected in ((False, []), (True, [0])):
        monkeypatch.setattr(worker, "_has_hung_threads", hangs)
        with pytest.raises(SystemExit):
            cli.console()
        assert left == expected
