"""Figures of pairs against their definitions."""

import json
import math

import numpy as np
import pytest

from megadpo.config.schema import ObjectiveConfig
from megadpo.evaluation import reward_bench
from megadpo.evaluation.figures import finite
from megadpo.evaluation.harness import _numbers
from megadpo.evaluation.scores import Measured, kind_of_objective, kinds_there_are, scores
from megadpo.evaluation.statistics import accuracy_of, by_length, calibration_of, kl_of, record_of, wilson


def test_a_tie_is_counted_and_is_no_win() -> None:
    record = accuracy_of(np.array([1.0, 0.0, -2.0, 3.0, 0.0]))
    assert (record["num_pairs"], record["accuracy"], record["num_ties"]) == (5, 2 / 5, 2)


@pytest.mark.parametrize(("num_right", "count"), [(0, 10), (10, 10), (3, 40), (500, 1000)])
def test_the_interval_s_bounds_are_what_the_normal_test_just_accepts(num_right: int, count: int) -> None:
    share = num_right / count
    for bound in wilson(num_right, count):
        assert bound is not None and 0 <= bound <= 1
        assert abs(share - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / count), abs=1e-6)
    assert wilson(0, 0) == (None, None)


def test_scores_that_are_right_as_often_as_they_say_have_no_calibration_error() -> None:
    margin = math.log(3)  # a probability of 3/4
    bins, error = calibration_of(np.array([margin, margin, margin, -margin]))
    assert error == pytest.approx(0, abs=1e-12) and len(bins) == 1
    assert (bins[0]["num_pairs"], bins[0]["accuracy"], bins[0]["predicted"]) == (4, 0.75, pytest.approx(0.75))
    assert bins[0]["low"] <= 0.75 <= bins[0]["high"]


def test_the_calibration_error_is_the_mean_distance_over_pairs() -> None:
    sure, unsure = math.log(19), math.log(1.5)  # 0.95 and 0.6
    bins, error = calibration_of(np.array([sure, -sure, unsure, 0.0]))
    assert [record["num_pairs"] for record in bins] == [1, 1, 2]
    assert error == pytest.approx((1 * 0.0 + 1 * (1 - 0.6) + 2 * (0.95 - 0.5)) / 4)


def test_figures_of_a_subset_are_of_its_pairs_alone() -> None:
    tokens_P2 = np.array([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0]])
    logps_P2, reference_P2 = (
        np.array([[-1.0, -2.0], [-3.0, -1.0], [0.0, 0.0]]),
        np.array([[-2.0, -1.0], [-3.0, -2.0], [-1, 0]]),
    )
    measured = Measured(tokens_P2, logps_P2=logps_P2, reference_logps_P2=reference_P2)
    record = record_of(scores("log_ratio", measured, ObjectiveConfig(beta=0.5)), measured, np.array([True, True, False]))
    assert (record["num_pairs"], record["accuracy"]) == (2, 0.5)
    assert record["margin"] == pytest.approx((0.5 * 2 - 0.5 * 1) / 2)
    assert (record["chosen_win_rate"], record["rejected_win_rate"]) == (0.5, 0.5)
    assert (record["chosen_log_ratio"], record["rejected_log_ratio"]) == (0.5, 0.0)
    assert [one["num_pairs"] for one in by_length(np.zeros(3), measured)] == [1, 1, 1]


def test_kinds_of_score_are_those_that_the_models_give() -> None:
    ones = np.ones((2, 2))
    assert kinds_there_are(Measured(ones, rewards_P2=ones)) == ["reward"]
    assert kinds_there_are(Measured(ones, logps_P2=ones)) == ["log_prob", "mean_log_prob"]
    assert kinds_there_are(Measured(ones, logps_P2=ones, reference_logps_P2=ones))[:2] == ["log_ratio", "mean_log_ratio"]


@pytest.mark.parametrize(
    ("loss", "kind"),
    [("sigmoid", "log_ratio"), ("kto", "log_ratio"), ("simpo", "mean_log_prob"), ("cpo", "log_prob"), ("reward", "reward")],
)
def test_a_run_is_judged_by_what_its_objective_calls_reward(loss: str, kind: str) -> None:
    assert kind_of_objective(ObjectiveConfig(loss_type=loss)) == kind


@pytest.mark.parametrize(
    ("loss", "kind", "other"), [("simpo", "mean_log_prob", "log_prob"), ("cpo", "log_prob", "mean_log_prob")]
)
def test_alphapo_s_alpha_is_for_the_kind_that_its_objective_calls_reward(loss: str, kind: str, other: str) -> None:
    measured = Measured(np.array([[2.0, 4.0]]), logps_P2=np.array([[-1.0, -8.0]]))
    plain, alpha = ObjectiveConfig(loss_type=loss, beta=2.0), ObjectiveConfig(loss_type=loss, beta=2.0, alphapo_alpha=0.5)
    values_P2 = scores(kind, measured, plain) / 2
    assert scores(kind, measured, alpha) == pytest.approx(2 * (1 - np.exp(-0.5 * values_P2)) / 0.5)
    assert (scores(other, measured, alpha) == scores(other, measured, plain)).all()


def test_scores_that_overflow_leave_a_report_that_json_can_have() -> None:
    measured = Measured(np.full((3, 2), 900.0), logps_P2=np.array([[-2000.0, -3000.0], [-1.0, -2000.0], [-1.0, -2.0]]))
    overflows = scores("log_prob", measured, ObjectiveConfig(loss_type="cpo", alphapo_alpha=1.0))
    assert np.isinf(overflows).tolist() == [[True, True], [False, True], [False, False]]
    with np.errstate(invalid="ignore"):
        record = record_of(overflows, measured, np.ones(3, bool))
        bins, error = calibration_of(overflows[:, 0] - overflows[:, 1])
    assert sum(one["num_pairs"] for one in bins) == 2 and math.isfinite(error)
    told = finite({"all": record, "lines": [[math.inf, 1.5, "a", None]]})
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["all"]["margin"] is None and told["all"]["accuracy"] == 2 / 3 and told["lines"] == [[None, 1.5, "a", None]]


def test_of_the_harness_s_figures_one_that_is_not_finite_is_none() -> None:
    figures = {"alias": "lambada", "perplexity,none": math.inf, "acc,none": 0, "acc_stderr,none": math.nan, "is": True}
    assert _numbers(figures) == {"perplexity,none": None, "acc,none": 0.0, "acc_stderr,none": None}


def test_the_kl_estimates_of_equal_models_are_zero() -> None:
    record = kl_of(np.zeros(3), np.array([2.0, 3.0, 5.0]))
    assert (record["estimate"], record["estimate_k3"], record["per_token"], record["standard_error"]) == (0, 0, 0, 0)
    record = kl_of(np.array([1.0, 3.0]), np.array([2.0, 6.0]))
    assert (record["estimate"], record["per_token"]) == (2, 0.5)
    assert record["estimate_k3"] == pytest.approx((1 - 1 + math.exp(-1) + 3 - 1 + math.exp(-3)) / 2)


def test_reward_bench_s_sections_weigh_their_subsets_by_its_counts() -> None:
    accuracies = {"alpacaeval-easy": 1.0, "mt-bench-easy": 0.5, "math-prm": 0.0, "hep-go": 1.0, "made up": 1.0}
    chat, reasoning = reward_bench.sections(accuracies)
    assert (chat["name"], chat["accuracy"], chat["num_subsets"]) == ("Chat", pytest.approx((100 + 14) / 128), 2)
    assert reasoning["accuracy"] == pytest.approx(164 / (984 + 164)) and "hep-cpp" in reasoning["missing"]
    assert reward_bench.mean([chat, reasoning]) is None
    whole = reward_bench.sections({name: 0.75 for counts in reward_bench.SECTIONS.values() for name in counts})
    assert reward_bench.mean(whole) == pytest.approx(0.75) and sum(one["num_subsets"] for one in whole) == 23
