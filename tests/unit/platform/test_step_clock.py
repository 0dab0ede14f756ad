"""A step is in one part at any moment: the parts add up to it, and what is nested counts once."""

from __future__ import annotations

import time

import pytest
import torch

from megadpo.platform.step_clock import PARTS, TIMERS, StepClock, part


def test_the_parts_add_up_to_the_step_and_what_is_nested_counts_once() -> None:
    clock = StepClock(torch.device("cpu"))
    with part("forward"):  # no step is under way: nothing is measured
        time.sleep(0.01)
    started = time.perf_counter()
    with clock.step():
        time.sleep(0.02)
        with part("reference"):
            TIMERS("forward-compute", log_level=2).start()
            time.sleep(0.02)
            TIMERS("forward-recv", log_level=2).start()
            time.sleep(0.02)
            TIMERS("forward-recv").stop()
            TIMERS("forward-compute").stop()
        with part("optimizer"):
            TIMERS("optimizer-inner-step", log_level=1).start()
            time.sleep(0.02)
            TIMERS("optimizer-inner-step").stop()
    whole = time.perf_counter() - started
    seconds = clock.seconds()
    assert list(seconds) == list(PARTS)
    assert sum(seconds.values()) == pytest.approx(whole, abs=0.005)
    assert seconds["forward"] == seconds["backward"] == 0
    assert all(seconds[name] >= 0.019 for name in ("data", "reference", "communication", "optimizer"))
    assert sum(clock.seconds().values()) == 0


def test_a_step_that_broke_off_leaves_nothing_to_the_next_one() -> None:
    clock = StepClock(torch.device("cpu"))
    with pytest.raises(RuntimeError), clock.step(), part("forward"):
        TIMERS("backward-compute", log_level=2).start()
        raise RuntimeError
    clock.seconds()
    with clock.step():
        time.sleep(0.01)
    assert clock.seconds()["data"] >= 0.009
