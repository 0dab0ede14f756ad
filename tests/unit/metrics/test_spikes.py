"""What a spike is."""

from __future__ import annotations

import json
import math

import pytest

from megadpo.metrics.spikes import FEWEST, WINDOW, SpikeWatch


def after(steps: int, loss: float = 0.7, norm: float = 2.0) -> SpikeWatch:
    watch = SpikeWatch(6.0)
    for number in range(steps):
        assert watch.spike(loss + 0.01 * (number % 2), norm + 0.1 * (number % 3)) is None
    return watch


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (0.7, math.inf), (-math.inf, math.nan)])
def test_what_is_not_finite_is_a_spike_from_the_first_step_on_and_never_counts(loss: float, norm: float) -> None:
    watch = SpikeWatch(6.0)
    assert watch.spike(loss, norm) is not None
    assert all(map(math.isfinite, watch.losses + watch.norms))


def test_a_value_is_compared_once_there_are_enough_of_them() -> None:
    assert after(FEWEST - 1).spike(0.7, 1e9) is None
    assert "gradient norm is 1e+09, above the mean" in str(after(FEWEST).spike(0.7, 1e9))
    assert "the loss is 50, above" in str(after(FEWEST).spike(50.0, 2.0))


def test_values_that_hardly_differ_have_no_spikes_of_rounding() -> None:
    watch = SpikeWatch(6.0)
    for _ in range(FEWEST):
        watch.spike(0.7, 2.0)
    assert watch.spike(0.7 * 1.5, 2.0 * 1.5) is None
    assert watch.spike(0.7 * 2.0, 2.0) is not None


def test_what_lasts_is_no_spike() -> None:
    watch = after(WINDOW)
    found = [watch.spike(0.7, 20.0) is not None for _ in range(WINDOW)]
    assert found[0] and not any(found[10:])


def test_a_watch_that_goes_on_decides_as_the_one_that_never_stopped() -> None:
    one, other = after(40), SpikeWatch(6.0)
    one.count(updated=False)
    other.load(json.loads(json.dumps(one.state())))
    assert other == one and other.num_left_out == 1
    other.load({})
    assert other == SpikeWatch(6.0)


def test_a_state_stays_what_it_was_while_the_watch_goes_on() -> None:
    watch = after(40)
    state = watch.state()
    written = json.dumps(state)
    watch.spike(0.7, 2.0)
    assert json.dumps(state) == written
