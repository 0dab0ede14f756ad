"""Objectives are pure functions of per-response statistics: right values, right gradients, exact weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megadpo.config.schema import ObjectiveConfig
from megadpo.objectives.specs import SPECS, kind_of
from megadpo.objectives.statistics import DIFFERENTIABLE, ResponseStatistics
from megadpo.objectives.terms import Normalisers
from tests.helpers.statistics import evaluate, random_statistics

statistics = random_statistics


def test_sigmoid_is_the_loss_of_the_dpo_paper():
    given_ = statistics(6)
    found = evaluate(given_, Normalisers(6), ObjectiveConfig(beta=0.3))
    for pair in range(6):
        z_chosen, z_rejected = (float(given_.logps_R[i] - given_.reference_logps_R[i]) for i in (2 * pair, 2 * pair + 1))
        expected = math.log1p(math.exp(-0.3 * (z_chosen - z_rejected)))
        assert float(found.losses_U[pair]) == pytest.approx(expected, rel=1e-12)
    assert float(found.loss) == pytest.approx(float(found.losses_U.mean()), rel=1e-12)


def test_label_smoothing_is_conservative_dpo():
    given_ = statistics(5)
    z = given_.logps_R - given_.reference_logps_R
    scaled = 0.2 * (z[::2] - z[1::2])
    expected = -(1 - 0.1) * F.logsigmoid(scaled) - 0.1 * F.logsigmoid(-scaled)
    found = evaluate(given_, Normalisers(5), ObjectiveConfig(beta=0.2, label_smoothing=0.1))
    torch.testing.assert_close(found.losses_U, expected, rtol=1e-12, atol=0)


CHECKED = [
    {},
    {"beta": 0.5, "label_smoothing": 0.2},
    {"length_penalty": 0.01},
    {"dpop_lambda": 2.0},
    {"nll_coef": 0.5},
    {"loss_type": "hinge", "dpop_lambda": 1.0, "length_penalty": 0.02},
    {"loss_type": "ipo", "ipo_normalization": "sum"},
    {"loss_type": "orpo"},
    {"loss_type": "cpo", "label_smoothing": 0.1, "nll_coef": 1.0},
    {"loss_type": "simpo", "simpo_gamma": 0.3},
    {"loss_type": "simpo", "alphapo_alpha": 0.25},
    {"loss_type": ["apo_zero", "sft", "discopop"], "loss_weights": [0.5, 1.0, 0.1]},
    *({"loss_type": name, **({"label_smoothing": 0.1} if name == "exo_pair" else {})} for name in SPECS if name != "custom"),
    {"loss_type": "custom", "module": "examples/custom_objective.py:squared_hinge"},
    {"loss_type": "all_pairs", "list_weights": "score"},
    {"loss_type": "all_pairs", "list_weights": "lambda"},
    {"loss_type": "reward", "reward_center_coef": 0.1},
    {"loss_type": ["kto", "sft"], "desirable_weight": 1.3},
    {"loss_type": "plackett_luce", "nll_coef": 0.3},
    {"margins": True, "soft_labels": True, "row_weights": True},
]


@pytest.mark.parametrize("options", CHECKED, ids=str)
def test_the_gradient_is_the_numeric_one(options):
    objective = ObjectiveConfig(**options)
    size = {"pairs": 2, "lists": 4, "labels": 1, "examples": 1}[kind_of(objective.loss_types)]
    given_ = statistics(8 // size, size=size, numbers=True)
    normalisers = Normalisers(4, 60, 90, kl=2.0, delta=0.1)
    found = evaluate(given_, normalisers, objective)
    for column, name in enumerate(DIFFERENTIABLE):
        for i in range(8):
            step = torch.zeros(8, dtype=torch.float64)
            step[i] = 1e-5
            up, down = (
                evaluate(replace(given_, **{name: getattr(given_, name) + sign * step}), normalisers, objective).loss
                for sign in (1, -1)
            )
            assert float(found.gradient_RD[i, column]) == pytest.approx(float(up - down) / 2e-5, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("change", [{"beta": 0.11}, {"label_smoothing": 0.05}])
def test_every_option_changes_the_gradient(change):
    given_ = statistics(4)
    base = evaluate(given_, Normalisers(4), ObjectiveConfig(beta=0.1))
    changed = evaluate(given_, Normalisers(4), replace(ObjectiveConfig(beta=0.1), **change))
    assert not torch.allclose(base.gradient_RD, changed.gradient_RD, rtol=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.data())
def test_splitting_a_batch_in_any_way_adds_up_to_the_whole(num_pairs, data):
    whole = evaluate(statistics(num_pairs), Normalisers(num_pairs), ObjectiveConfig())
    cut = data.draw(st.integers(1, num_pairs - 1))
    parts = []
    for pairs in (slice(0, cut), slice(cut, num_pairs)):
        responses = slice(2 * pairs.start, 2 * pairs.stop)
        s = statistics(num_pairs)
        tensors = {name: getattr(s, name)[responses] for name in vars(s) if name.endswith("_R")}
        count = pairs.stop - pairs.start
        part = ResponseStatistics(**tensors, first_G=torch.arange(0, 2 * count, 2))
        parts.append(evaluate(part, Normalisers(num_pairs), ObjectiveConfig()))
    torch.testing.assert_close(torch.cat([part.gradient_RD for part in parts]), whole.gradient_RD, rtol=1e-12, atol=0)
    assert float(sum(part.loss for part in parts)) == pytest.approx(float(whole.loss), rel=1e-12)


def test_equal_policy_and_reference_give_ln_2():
    given_ = statistics(3)
    found = evaluate(replace(given_, reference_logps_R=given_.logps_R), Normalisers(3), ObjectiveConfig())
    assert float(found.loss) == pytest.approx(math.log(2), rel=1e-12)


def test_a_row_weight_multiplies_the_rows_loss_and_nothing_else():
    given_ = statistics(3)
    weights = torch.tensor([1.0, 0.0, 2.5]).double()
    found = evaluate(replace(given_, row_weight_R=weights.repeat_interleave(2)), Normalisers(3), ObjectiveConfig())
    plain = evaluate(given_, Normalisers(3), ObjectiveConfig())
    torch.testing.assert_close(found.losses_U, plain.losses_U * weights)
    torch.testing.assert_close(found.gradient_RD, plain.gradient_RD * weights.repeat_interleave(2)[:, None])
    torch.testing.assert_close(found.rewards_R, plain.rewards_R)


def test_no_pairs_at_all_give_no_loss():
    found = evaluate(statistics(0), Normalisers(4), ObjectiveConfig())
    assert float(found.loss) == 0 and found.gradient_RD.shape == (0, 4)
