"""The best evaluation and its patience, against transformers' early stopping."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megadpo.metrics.best import MOST_KNOWN, Best


def by_transformers(values: list[float], is_more_better: bool, patience: int, threshold: float) -> tuple[list[int], int]:
    """The steps at which transformers would have kept a new best model, and the one at which it would have stopped."""
    from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

    arguments = TrainingArguments(
        output_dir="unused", metric_for_best_model="eval_x", greater_is_better=is_more_better, use_cpu=True
    )
    stop, state, control, best = EarlyStoppingCallback(patience, threshold), TrainerState(), TrainerControl(), []
    for step, value in enumerate(values, 1):
        stop.on_evaluate(arguments, state, control, {"eval_x": value})
        # As Trainer._determine_best_metric does after it.
        if state.best_metric is None or (value > state.best_metric if is_more_better else value < state.best_metric):
            state.best_metric = value
            best.append(step)
        if control.should_training_stop:
            return best, step
    return best, len(values)


@pytest.mark.parametrize("is_more_better", [False, True])
@pytest.mark.parametrize(("patience", "threshold"), [(1, 0.0), (3, 0.0), (2, 0.3)])
def test_the_best_and_the_end_are_those_of_transformers(is_more_better, patience, threshold):
    for seed in range(20):
        values = np.random.default_rng(seed).normal(size=30).tolist()
        best = Best("eval_x", is_more_better, patience, threshold)
        found, last = [], len(values)
        for step, value in enumerate(values, 1):
            if best.take(step, {"eval_x": value}):
                found.append(step)
            if best.is_out_of_patience:
                last = step
                break
        assert (found, last) == by_transformers(values, is_more_better, patience, threshold)
        assert best.step == found[-1] and best.value == values[found[-1] - 1] == best.value_at(found[-1])


def test_an_improvement_of_just_as_much_as_is_asked_for_counts():
    best = Best("x", False, patience=1, min_improvement=0.25)
    assert best.take(1, {"x": 1.0}) and best.take(2, {"x": 0.75}) and not best.is_out_of_patience
    assert best.take(3, {"x": 0.625}) and best.is_out_of_patience, "it is the best, and not better enough"


def test_what_has_no_number_is_never_the_best_and_counts_as_no_improvement():
    best = Best("x", True, patience=3)
    assert not best.take(1, {"x": math.nan}) and not best.take(2, {}) and best.step is best.value is None
    assert best.take(3, {"x": -1.0}) and best.num_without == 0 and not best.take(4, {"x": math.inf})


def test_a_run_goes_on_with_what_its_state_says_of_the_same_metric():
    best = Best("x", False, patience=2)
    for step in range(1, 20):
        best.take(step, {"x": 1 / step})
    best.take(20, {"x": 1.0})
    again, other = Best("x", False, patience=2), Best("y", False)
    assert again.load(best.state()) and not other.load(best.state())
    assert (again, other.found) == (best, []) and again.steps == list(range(20 - MOST_KNOWN, 20))
    assert not again.take(21, {"x": 2.0}) and again.is_out_of_patience


def test_what_was_found_in_the_other_direction_or_of_other_pairs_is_not_gone_on_with():
    best = Best("x", False, patience=2, held_out="a")
    best.take(1, {"x": 1.0})
    for other in (Best("x", True, patience=2, held_out="a"), Best("x", False, patience=2, held_out="b")):
        assert not other.load(best.state()) and other.found == []


def test_without_a_metric_nothing_is_looked_for():
    best = Best()
    assert not best.take(1, {"eval_loss": 1.0}) and not best.is_out_of_patience and best.steps == []
