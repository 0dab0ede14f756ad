"""Signals that ask for an end: left at once before there is anything to save, noted afterwards, the second Ctrl-C heeded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from megadpo.launch import signals
from megadpo.launch.signals import EXIT_INTERRUPTED, EXIT_PREEMPTED, Stopped, leaving_at_once, noting


@pytest.fixture(autouse=True)
def no_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RANK", raising=False)
    before = [signal.getsignal(number) for number in signals.STATUS_OF_SIGNAL]
    yield
    assert [signal.getsignal(number) for number in signals.STATUS_OF_SIGNAL] == before, "put back"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_process_that_has_nothing_to_save_leaves_at_once(number: signal.Signals) -> None:
    for until_deferred in (leaving_at_once, noting):
        with pytest.raises(Stopped) as caught, until_deferred():
            os.kill(os.getpid(), number)
        assert caught.value.code == EXIT_PREEMPTED
    with pytest.raises(KeyboardInterrupt), noting():
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("numbers", "status"),
    [
        ([signal.SIGTERM], EXIT_PREEMPTED),
        ([signal.SIGUSR1] * 3, EXIT_PREEMPTED),
        ([signal.SIGINT], EXIT_INTERRUPTED),
        ([signal.SIGTERM, signal.SIGINT], EXIT_PREEMPTED),
    ],
)
def test_once_deferred_signals_are_noted_and_the_first_decides(numbers: list[signal.Signals], status: int) -> None:
    heard: list[signal.Signals] = []
    with noting(heard.append) as request:
        request.is_deferred = True
        for number in numbers:
            os.kill(os.getpid(), number)
    assert request.status == status and heard == numbers[:1]


def test_the_second_ctrl_c_is_heeded_and_of_a_rank_only_when_it_is_no_echo_of_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(KeyboardInterrupt), noting() as request:
        request.is_deferred = True
        os.kill(os.getpid(), signal.SIGINT)
        assert request.status == EXIT_INTERRUPTED
        os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setenv("RANK", "1")
    with noting() as request:
        request.is_deferred = True
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(signals, "SECONDS_OF_ONE_CTRL_C", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_forked_process_does_not_take_its_parents_signals_for_its_own() -> None:
    with noting() as request:
        request.is_deferred = True
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert request.status is None


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored() -> None:
    code = (
        "import os, signal; from megadpo.launch.signals import noting\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "with noting() as request:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "print(request.status)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "None\n", result.stderr
