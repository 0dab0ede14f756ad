"""What theory says of the losses holds for any batch: permutations, micro-batches, swapped sides, shifts, extremes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megadpo.config.schema import ObjectiveConfig
from megadpo.objectives.evaluate import Evaluated
from megadpo.objectives.specs import SPECS, kind_of
from megadpo.objectives.statistics import ResponseStatistics
from megadpo.objectives.terms import Normalisers
from tests.helpers.statistics import evaluate, random_statistics

BETA = 0.1
NEEDED = {"exo_pair": {"label_smoothing": 0.1}, "custom": {"module": "examples/custom_objective.py:squared_hinge"}}
LOSSES: dict[str, ObjectiveConfig] = {
    name: ObjectiveConfig(loss_type=name, beta=BETA, **NEEDED.get(name, {})) for name in SPECS
} | {
    "every option of pairs": ObjectiveConfig(
        loss_type=["sigmoid", "sft"],
        loss_weights=[0.8, 0.3],
        label_smoothing=0.1,
        f_divergence="js",
        wpo=True,
        nll_coef=0.2,
        length_penalty=0.01,
        dpop_lambda=0.5,
        margins=True,
        row_weights=True,
    ),
    "labels and weights": ObjectiveConfig(loss_type=["kto", "sft"], desirable_weight=1.3, row_weights=True),
    "score-weighted lists": ObjectiveConfig(loss_type="all_pairs", list_weights="score", nll_coef=0.2),
    "lambda-weighted lists": ObjectiveConfig(loss_type="all_pairs", list_weights="lambda", row_weights=True),
}
COUPLED = [name for name, options in LOSSES.items() if any(SPECS[loss].couples_batch for loss in options.loss_types)]
SEPARABLE = [name for name in LOSSES if name not in COUPLED]
SIZES = {"pairs": 2, "lists": 4, "labels": 1, "examples": 1}

seeds, counts = st.integers(0, 10_000), st.integers(1, 7)
scales = st.sampled_from([0.01, 1.0, 30.0])
examples = settings(max_examples=15, deadline=None)


def _batch(name: str, num_groups: int, seed: int, scale: float = 1.0) -> ResponseStatistics:
    """Random responses whose log-ratios are `scale` times as large as usual."""
    # Losses over the sorted batch have no row of their own whose weight they could have.
    s = random_statistics(num_groups, seed, SIZES[kind_of(LOSSES[name].loss_types)], numbers=name not in COUPLED)
    return replace(s, reference_logps_R=s.logps_R + scale * (s.reference_logps_R - s.logps_R))


def _normalisers(num_groups: int) -> Normalisers:
    return Normalisers(num_groups, 30 * num_groups, 50 * num_groups, kl=1.3, delta=0.2)


def _select(s: ResponseStatistics, responses: Tensor, size: int) -> ResponseStatistics:
    """The responses with these numbers, as groups of `size`."""
    chosen = {name: values[responses] for name, values in vars(s).items() if name.endswith("_R")}
    return ResponseStatistics(**chosen, first_G=torch.arange(0, len(responses), size))


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", LOSSES)
@examples
@given(num_groups=counts, seed=seeds, scale=scales, data=st.data())
def test_permuting_the_units_permutes_losses_and_gradients(name, num_groups, seed, scale, data):
    s = _batch(name, num_groups, seed, scale)
    size = len(s.logps_R) // num_groups
    order = torch.tensor(data.draw(st.permutations(range(num_groups))))
    responses = (order[:, None] * size + torch.arange(size)).flatten()
    whole = evaluate(s, _normalisers(num_groups), LOSSES[name])
    permuted = evaluate(_select(s, responses, size), _normalisers(num_groups), LOSSES[name])
    _close(permuted.loss, whole.loss)
    _close(permuted.gradient_RD, whole.gradient_RD[responses])
    # Losses over the sorted batch have no pair of their own: there are as many, in the order of the sort.
    _close(permuted.losses_U, whole.losses_U if name in COUPLED else whole.losses_U[order])


@pytest.mark.parametrize("name", SEPARABLE)
@examples
@given(num_groups=st.integers(2, 7), seed=seeds, data=st.data())
def test_micro_batches_add_up_to_the_batch(name, num_groups, seed, data):
    s = _batch(name, num_groups, seed)
    size = len(s.logps_R) // num_groups
    cuts = sorted(data.draw(st.sets(st.integers(1, num_groups - 1))))
    whole = evaluate(s, _normalisers(num_groups), LOSSES[name])
    parts = [
        evaluate(_select(s, torch.arange(start * size, end * size), size), _normalisers(num_groups), LOSSES[name])
        for start, end in itertools.pairwise([0, *cuts, num_groups])
    ]
    _close(torch.cat([part.gradient_RD for part in parts]), whole.gradient_RD)
    _close(torch.stack([part.loss for part in parts]).sum(), whole.loss)


@pytest.mark.parametrize("name", COUPLED)
def test_micro_batches_of_a_coupled_loss_do_not_add_up(name):
    """That is why these losses see the whole batch."""
    s = _batch(name, 6, seed=0, scale=30)
    whole = evaluate(s, _normalisers(6), LOSSES[name])
    halves = [evaluate(_select(s, torch.arange(6 * i, 6 * i + 6), 2), _normalisers(6), LOSSES[name]) for i in range(2)]
    apart = torch.cat([half.gradient_RD for half in halves]) - whole.gradient_RD
    assert float(apart.norm() / whole.gradient_RD.norm()) > 0.01


def _margin(values_R: Tensor) -> Tensor:
    return values_R[::2] - values_R[1::2]


def _log_sigmoid_gap(s: ResponseStatistics) -> Tensor:
    return torch.nn.functional.logsigmoid(BETA * (s.logps_R - s.reference_logps_R))


# Loss minus the loss with chosen and rejected swapped, from z = log-ratio and the statistics.
DIFFERENCES: dict[str, Callable[[Tensor, ResponseStatistics], Tensor]] = {
    "sigmoid": lambda z, s: -BETA * _margin(z),
    "sigmoid_norm": lambda z, s: -BETA * _margin(z / s.num_completion_tokens_R),
    "hinge": lambda z, s: torch.relu(1 - BETA * _margin(z)) - torch.relu(1 + BETA * _margin(z)),
    "ipo": lambda z, s: -2 * _margin(z / s.num_completion_tokens_R) / BETA,
    "robust": lambda z, s: -BETA * _margin(z),
    "nca_pair": lambda z, s: -_margin(_log_sigmoid_gap(s)),
    "bco_pair": lambda z, s: -BETA * _margin(z),
    "sppo_hard": lambda z, s: -2 * _margin(z) / BETA,
    "rpo_sq": lambda z, s: 0 * _margin(z),  # the given scores are swapped too
    "rpo_bwd_kl": lambda z, s: 0 * _margin(z),
    "rpo_fwd_kl": lambda z, s: 0 * _margin(z),
    "cpo": lambda z, s: -BETA * _margin(s.token_logps_R),
    "simpo": lambda z, s: -BETA * _margin(s.token_logps_R / s.num_tokens_R),
    "reward": lambda z, s: -_margin(s.reward_R),
}


def _neutral(s: ResponseStatistics) -> ResponseStatistics:
    """Rows without margins, weights and soft labels."""
    ones = torch.ones_like(s.logps_R)
    return replace(s, margin_R=0 * ones, row_weight_R=ones, label_probability_R=ones)


@pytest.mark.parametrize("name", DIFFERENCES)
@examples
@given(num_groups=counts, seed=seeds, scale=scales)
def test_swapping_chosen_and_rejected_negates_the_margin(name, num_groups, seed, scale):
    s = _neutral(_batch(name, num_groups, seed, scale))
    options = ObjectiveConfig(loss_type=name, beta=BETA, **({"simpo_gamma": 0.0} if name == "simpo" else {}))
    swapped = _select(s, torch.arange(2 * num_groups).view(-1, 2).flip(1).flatten(), 2)
    normalisers = Normalisers(num_groups)
    right, wrong = (evaluate(statistics, normalisers, options) for statistics in (s, swapped))
    _close(_margin(wrong.rewards_R), -_margin(right.rewards_R))
    _close(right.losses_U - wrong.losses_U, DIFFERENCES[name](s.logps_R - s.reference_logps_R, s))


def _of_margin(num_groups: int, seed: int, scale: float, **options: Any) -> tuple[Evaluated, Evaluated, Tensor]:
    """A loss at h and at -h, and h."""
    s = _neutral(_batch("sigmoid", num_groups, seed, scale))
    mirrored = replace(s, reference_logps_R=2 * s.logps_R - s.reference_logps_R)
    config = ObjectiveConfig(beta=BETA, **options)
    at, mirror = (evaluate(statistics, Normalisers(num_groups), config) for statistics in (s, mirrored))
    return at, mirror, BETA * _margin(s.logps_R - s.reference_logps_R)


@examples
@given(num_groups=counts, seed=seeds, scale=scales, smoothing=st.floats(0, 0.49))
def test_smoothed_labels_mix_the_loss_with_that_of_flipped_labels(num_groups, seed, scale, smoothing):
    clean, flipped, h = _of_margin(num_groups, seed, scale)
    smooth, smooth_flipped, _ = _of_margin(num_groups, seed, scale, label_smoothing=smoothing)
    _close(smooth.losses_U, (1 - smoothing) * clean.losses_U + smoothing * flipped.losses_U)
    _close(smooth.losses_U - smooth_flipped.losses_U, -(1 - 2 * smoothing) * h)


@examples
@given(num_groups=counts, seed=seeds, scale=scales, smoothing=st.floats(0, 0.45))
def test_robust_is_unbiased_under_flipped_labels(num_groups, seed, scale, smoothing):
    clean, _, _ = _of_margin(num_groups, seed, scale)
    robust, robust_flipped, _ = _of_margin(num_groups, seed, scale, loss_type="robust", label_smoothing=smoothing)
    _close((1 - smoothing) * robust.losses_U + smoothing * robust_flipped.losses_U, clean.losses_U)
    _close((1 - smoothing) * robust.gradient_RD - smoothing * robust_flipped.gradient_RD, clean.gradient_RD)


@examples
@given(num_groups=counts, seed=seeds, scale=scales, smoothing=st.floats(0.01, 0.49))
def test_exo_is_least_where_the_policy_is_as_sure_as_the_labels(num_groups, seed, scale, smoothing):
    """A KL: nowhere below zero, and zero at sigmoid(h) = 1 - smoothing."""
    options = {"loss_type": "exo_pair", "label_smoothing": smoothing}
    assert float(_of_margin(num_groups, seed, scale, **options)[0].losses_U.min()) >= -1e-15
    s = _neutral(_batch("sigmoid", num_groups, seed))
    as_sure = torch.logit(torch.tensor(1 - smoothing, dtype=torch.float64)) / BETA
    first = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(num_groups)
    at = replace(s, reference_logps_R=s.logps_R - as_sure * first)
    found = evaluate(at, Normalisers(num_groups), ObjectiveConfig(beta=BETA, **options))
    assert float(found.losses_U.abs().max()) < 1e-12 and float(found.gradient_RD.abs().max()) < 1e-12


@pytest.mark.parametrize("name", [name for name in LOSSES if SPECS[LOSSES[name].loss_types[0]].needs_reference])
@examples
@given(num_groups=counts, seed=seeds, shift=st.floats(-100, 100))
def test_shifting_policy_and_reference_together_changes_nothing(name, num_groups, seed, shift):
    s = _batch(name, num_groups, seed)
    shifts_R = shift * torch.linspace(-1, 1, len(s.logps_R), dtype=torch.float64)
    shifted = replace(s, logps_R=s.logps_R + shifts_R, reference_logps_R=s.reference_logps_R + shifts_R)
    if name.startswith("aot"):  # sorts pairs by the policy's and by the reference's own differences
        shifted = replace(s, logps_R=s.logps_R + shift, reference_logps_R=s.reference_logps_R + shift)
    before, after = (evaluate(statistics, _normalisers(num_groups), LOSSES[name]) for statistics in (s, shifted))
    _close(after.losses_U, before.losses_U)
    _close(after.gradient_RD, before.gradient_RD)


@pytest.mark.parametrize("name", ["plackett_luce", "best_vs_rest", "all_pairs", "score-weighted lists"])
@examples
@given(num_groups=counts, seed=seeds, scale=scales)
def test_a_list_of_two_is_a_pair_of_dpo(name, num_groups, seed, scale):
    s = _neutral(_batch("sigmoid", num_groups, seed, scale))
    options = replace(LOSSES[name], nll_coef=0.0)
    found, expected = (evaluate(s, Normalisers(num_groups), o) for o in (options, ObjectiveConfig(beta=BETA)))
    _close(found.losses_U, expected.losses_U)
    _close(found.gradient_RD, expected.gradient_RD)


def _list_of(values: list[float]) -> ResponseStatistics:
    """One list whose implicit rewards are `values`."""
    s = _neutral(random_statistics(1, size=len(values)))
    return replace(s, reference_logps_R=s.logps_R - torch.tensor(values, dtype=torch.float64) / BETA)


@pytest.mark.parametrize("name", ["plackett_luce", "all_pairs", "score-weighted lists"])
@examples
@given(st.lists(st.floats(-20, 20), min_size=2, max_size=4, unique=True))
def test_no_order_has_less_loss_than_that_of_the_scores(name, values):
    options = replace(LOSSES[name], nll_coef=0.0)
    losses = {
        order: float(evaluate(_list_of(list(order)), Normalisers(1), options).loss)
        for order in itertools.permutations(values)
    }
    assert losses[tuple(sorted(values, reverse=True))] <= min(losses.values()) + 1e-12


@examples
@given(st.lists(st.floats(-20, 20), min_size=2, max_size=6), st.data())
def test_best_vs_rest_does_not_mind_the_order_of_the_rest(values, data):
    rest = data.draw(st.permutations(values[1:]))
    losses = [evaluate(_list_of(v), Normalisers(1), LOSSES["best_vs_rest"]).loss for v in (values, [values[0], *rest])]
    _close(losses[0], losses[1])


@examples
@given(num_groups=counts, seed=seeds, scale=scales)
def test_a_pair_of_the_unpaired_losses_is_the_sum_of_its_answers(num_groups, seed, scale):
    s = _neutral(_batch("sigmoid", num_groups, seed, scale))
    alone = replace(s, first_G=torch.arange(2 * num_groups))
    normalisers = Normalisers(num_groups, delta=0.3)
    for paired, unpaired in (("apo_zero", "apo_zero_unpaired"), ("bco_pair", "bco")):
        pairs, answers = evaluate(s, normalisers, LOSSES[paired]), evaluate(alone, normalisers, LOSSES[unpaired])
        _close(answers.losses_U.view(-1, 2).sum(1), pairs.losses_U)
        _close(answers.gradient_RD, pairs.gradient_RD)


@examples
@given(num_groups=counts, seed=seeds, scale=scales)
def test_an_answer_and_its_opposite_label_share_one_of_kto(num_groups, seed, scale):
    s = _neutral(_batch("kto", num_groups, seed, scale))
    for name in ("kto", "apo_zero_unpaired"):
        liked, disliked = (
            evaluate(replace(s, label_R=label), _normalisers(num_groups), LOSSES[name])
            for label in (torch.ones_like(s.label_R), torch.zeros_like(s.label_R))
        )
        _close(liked.losses_U + disliked.losses_U, torch.ones(num_groups, dtype=torch.float64))
        _close(liked.gradient_RD, -disliked.gradient_RD)


# Largest log-ratio, where it is not 1e4: exp(-h) of discopop leaves float64 at h = -709.
LIMITS = {("discopop", "alpha"): 15.0}


@pytest.mark.parametrize(
    ("name", "divergence"),
    [(name, d) for name in SPECS for d in ("reverse_kl", "js", "alpha") if d == "reverse_kl" or SPECS[name].divergences],
)
@examples
@given(fractions=st.lists(st.floats(-1, 1), min_size=8, max_size=8))
def test_gradients_are_finite_at_extreme_log_ratios(name, divergence, fractions):
    extreme = LIMITS.get((name, divergence), 1e4) * torch.tensor(fractions, dtype=torch.float64)
    size = SIZES[kind_of([name])]
    s = random_statistics(8 // size, size=size)
    s = replace(s, logps_R=s.reference_logps_R + extreme, token_logps_R=-extreme.abs(), reward_R=extreme)
    options = replace(LOSSES[name], f_divergence=divergence)
    found = evaluate(s, Normalisers(8 // size, 100, 200, kl=3.0, delta=0.1), options)
    assert found.losses_U.isfinite().all() and found.gradient_RD.isfinite().all()
