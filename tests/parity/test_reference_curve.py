"""Both engines train hh-rlhf along the committed curve; tools/reference_curve.py says how it is made."""

from __future__ import annotations

import pytest

from tests.helpers.marks import skip_without
from tools.reference_curve import METRICS, ROWS, RUNS, TRAIN, committed, train, worst_error

skip_without("deepspeed")


NUM_STEPS = TRAIN["steps"]


def first_steps(curve, num_steps):
    return {name: values[:num_steps] for name, values in curve.items()}


@pytest.fixture(
    scope="module",
    params=[(list(RUNS)[:2], 8), pytest.param((list(RUNS), NUM_STEPS), marks=pytest.mark.exhaustive)],
    ids=["eight steps of an engine each", "all runs"],
)
def curves(request, tmp_path_factory):
    if not ROWS.exists():
        pytest.skip(f"{ROWS} is missing: the curve is of real hh-rlhf rows")
    directory, (names, num_steps) = tmp_path_factory.mktemp("curve"), request.param
    found = {name: train(directory, RUNS[name], num_steps) for name in names}
    assert all(len(curve["loss"]) == num_steps for curve in found.values())
    return found


@pytest.mark.slow
def test_every_run_follows_the_committed_curve(curves):
    """Within 1e-4 of each loss, gradient norm and margin (1e-6 where that is less)."""
    for name, curve in curves.items():
        assert worst_error(curve, first_steps(committed(), len(curve["loss"]))) <= 1, name


@pytest.mark.slow
def test_both_engines_follow_each_other(curves):
    megatron, *rest = curves.values()
    for name, curve in zip(list(curves)[1:], rest, strict=True):
        assert worst_error(curve, megatron) <= 1, name


def test_the_curve_is_of_training_that_works():
    curve = committed()
    assert all(len(curve[name]) == NUM_STEPS for name in METRICS)
    assert curve["loss"][0] == pytest.approx(0.6931471805599453, abs=1e-6) and curve["rewards/margins"][0] == 0
    assert sum(curve["loss"][-5:]) / 5 < 0.5 and sum(curve["rewards/margins"][-5:]) / 5 > 0.5


def test_a_step_that_is_off_by_a_thousandth_is_noticed():
    for name in METRICS:
        off = {other: list(values) for other, values in committed().items()}
        off[name][12] *= 1.001
        assert worst_error(off, committed()) > 1, name
