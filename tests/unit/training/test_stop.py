"""Whether a run stops: what a rank asks for, what the sum of all votes says, when a deadline is near."""

from __future__ import annotations

import contextlib
import os
import time
from types import SimpleNamespace
from typing import Any

import pytest

from megadpo.config.schema import Config
from megadpo.errors import UserError
from megadpo.launch.foreign import ancestors
from megadpo.launch.signals import EXIT_INTERRUPTED, EXIT_PREEMPTED, Request
from megadpo.metrics.best import Best
from megadpo.training import held_out
from megadpo.training.run import Callbacks, Run
from megadpo.training.saving import SaveTimes
from megadpo.training.stop import Deadline, Stopping, deadline_of


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ([None, None], None),
        ([None, EXIT_PREEMPTED], EXIT_PREEMPTED),
        ([EXIT_PREEMPTED] * 2, EXIT_PREEMPTED),
        ([EXIT_PREEMPTED, EXIT_INTERRUPTED], EXIT_INTERRUPTED),
        ([EXIT_PREEMPTED] * 100_000, EXIT_PREEMPTED),
    ],
)
def test_the_sum_of_the_votes_says_what_was_asked_for(asked: list[int | None], status: int | None) -> None:
    stopping = Stopping()
    stopping.count(sum(Stopping(Request(one)).vote() for one in asked))
    assert stopping.agreed == status


@pytest.mark.parametrize("on_failed_write", ["stop", "skip"])
def test_an_evaluation_made_up_for_is_written_as_any_record_is(
    on_failed_write: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class FullDisk:
        def write(self, record: Any) -> None:
            raise UserError("metrics.jsonl cannot be written")

        def close(self, has_failed: bool = False) -> None: ...

    monkeypatch.setattr(held_out, "evaluation", lambda run: {"eval_loss": 0.5})
    run: Any = Run.__new__(Run)
    run.setup, run.sinks, run.metrics, run.callbacks = SimpleNamespace(config=Config()), [FullDisk()], {}, Callbacks()
    run.setup.config.checkpoint.on_failed_write, run.best, run.heard = on_failed_write, Best(), frozenset()
    with pytest.raises(UserError) if on_failed_write == "stop" else contextlib.nullcontext():
        held_out.evaluate_and_write(run, 3)
    assert ("without the metrics of step 3" in capsys.readouterr().err) == (on_failed_write == "skip")
    assert run.metrics == {"eval_loss": 0.5}


def test_what_was_agreed_on_first_stays() -> None:
    stopping = Stopping()
    stopping.count(1.0)
    stopping.count(Stopping(Request(EXIT_INTERRUPTED)).vote())
    assert stopping.agreed == EXIT_PREEMPTED


def test_a_rank_whose_foreign_launcher_is_gone_asks_for_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Stopping(launcher=(1,)).vote() == 1.0
    me = ancestors(2)
    assert me[0] == os.getppid() and Stopping(launcher=me).vote() == 0.0 and Stopping(launcher=(me[0], 1)).vote() == 1.0
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    assert Stopping().launcher == (os.getppid(),)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setenv("LOCAL_SIZE", "2")
    monkeypatch.setenv("CROSS_SIZE", "1")
    assert Stopping().launcher == me
    monkeypatch.delenv("RANK")
    assert Stopping().launcher is None


@pytest.mark.parametrize(
    ("left", "step", "save", "begun", "is_near"),
    [
        (100, 1, 60, None, False),
        (100, 1, 70, None, True),
        (100, 60, 1, None, False),
        (100, 70, 1, None, True),
        (-1, 0, 0, None, True),
        # One that is being written has to end before the one that the deadline asks for.
        (100, 1, 60, 10, True),
        (100, 1, 60, 58, False),
        (100, 1, 60, 900, False),
    ],
)
def test_a_deadline_is_near_when_a_step_and_the_saves_and_half_as_much_do_not_fit_before_it(
    left: float, step: float, save: float, begun: float | None, is_near: bool
) -> None:
    saves = SaveTimes(longest=save, began=None if begun is None else time.monotonic() - begun)
    stopping = Stopping(deadline=Deadline(time.time() + left, expected_save=1e9, saves=saves))
    assert stopping.deadline is not None
    stopping.step_took(step)
    stopping.step_took(step / 2)
    assert stopping.deadline.is_near() == is_near and bool(stopping.vote()) == is_near


def test_a_save_is_reckoned_until_one_has_been_measured() -> None:
    deadline = deadline_of(100.0, time.time(), num_parameters=10**9)
    assert deadline is not None and deadline.expected_save == pytest.approx(60) and not deadline.is_near()
    deadline.saves.begin()
    assert deadline.saves.longest is None and deadline.is_near(), "it goes on behind the step loop"
    deadline.saves.end()
    assert deadline.saves.longest is not None and deadline.saves.longest < 1 and not deadline.is_near()
    assert deadline_of(None, time.time(), 1) is None
