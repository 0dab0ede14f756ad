"""Pairwise losses against a reference: one loss a pair, a sum over pairs, no coupling.

Definitions follow TRL 1.16's DPOTrainer, which the tests compare them with; see docs/objectives.md. `h` is beta times the
difference of the two responses' scores, z a response's log-ratio of policy to reference, eps the label smoothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megadpo.objectives.terms import Normalisers, Pairs, smoothed

PairLoss = Callable[[Pairs, Normalisers], Tensor]
"""One loss a pair."""


def sigmoid(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """DPO: -log sigmoid(h); with eps, conservative DPO; with soft labels, cross-entropy against them."""
    return smoothed(pairs.scaled_margin_P, pairs.wrong_P)


def sigmoid_norm(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """DPO on per-token scores."""
    score_R = pairs.per_token(pairs.score_R)
    return -F.logsigmoid(pairs.options.beta * (pairs.chosen(score_R) - pairs.rejected(score_R)))


def hinge(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """max(0, 1 - h)."""
    return F.relu(1 - pairs.scaled_margin_P)


def ipo(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """(difference of scores - 1 / (2 beta))^2; scores per token (as its authors confirm) or summed."""
    score_R = pairs.per_token(pairs.score_R) if pairs.options.ipo_normalization == "mean" else pairs.score_R
    return (pairs.chosen(score_R) - pairs.rejected(score_R) - 1 / (2 * pairs.options.beta)) ** 2


def exo_pair(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """Reverse KL from (sigmoid(h), sigmoid(-h)) to (1 - eps, eps)."""
    h, eps = pairs.scaled_margin_P, pairs.options.label_smoothing
    win = torch.sigmoid(h) * (F.logsigmoid(h) - math.log1p(-eps))
    return win + torch.sigmoid(-h) * (F.logsigmoid(-h) - math.log(eps))


def robust(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """Unbiased under labels flipped with probability eps."""
    h, eps = pairs.scaled_margin_P, pairs.options.label_smoothing
    return (-(1 - eps) * F.logsigmoid(h) + eps * F.logsigmoid(-h)) / (1 - 2 * eps)


def nca_pair(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """-log sigmoid(b z_c) - 1/2 log sigmoid(-b z_c) - 1/2 log sigmoid(-b z_r)."""
    chosen, rejected = _rewards(pairs)
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """-log sigmoid(b z_c - delta) - log sigmoid(-(b z_r - delta)): the two sides apart; delta 0 unless it runs."""
    chosen, rejected = _rewards(pairs)
    return -F.logsigmoid(chosen - normalisers.delta) - F.logsigmoid(-(rejected - normalisers.delta))


def sppo_hard(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """(z_c - 1/(2b))^2 + (z_r + 1/(2b))^2."""
    half = 0.5 / pairs.options.beta
    return (pairs.chosen(pairs.log_ratio_R) - half) ** 2 + (pairs.rejected(pairs.log_ratio_R) + half) ** 2


def apo_zero(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """1 - sigmoid(b z_c) + sigmoid(b z_r): chosen up, rejected down."""
    chosen, rejected = _rewards(pairs)
    return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


def apo_down(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """sigmoid(b z_c) + 1 - sigmoid(b (z_c - z_r)): both down, rejected more."""
    chosen, rejected = _rewards(pairs)
    return torch.sigmoid(chosen) + 1 - torch.sigmoid(chosen - rejected)


def discopop(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """Logistic and exponential loss mixed by sigmoid(h / tau), which is differentiated too."""
    h = pairs.scaled_margin_P
    scaled = h / pairs.options.discopop_tau
    # exp(-h) mix, together: far below zero one overflows where the other vanishes.
    exponential = torch.exp(F.logsigmoid(scaled) - h)
    return -F.logsigmoid(h) * (1 - torch.sigmoid(scaled)) + exponential


def rpo_bwd_kl(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """KL of (sigmoid(h), sigmoid(-h)) from the preference that the given scores imply."""
    h, given = _margin_and_given(pairs)
    win = torch.sigmoid(given) * (F.logsigmoid(given) - F.logsigmoid(h))
    return win + torch.sigmoid(-given) * (F.logsigmoid(-given) - F.logsigmoid(-h))


def rpo_fwd_kl(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """KL of the preference that the given scores imply from (sigmoid(h), sigmoid(-h))."""
    h, given = _margin_and_given(pairs)
    win = torch.sigmoid(h) * (F.logsigmoid(h) - F.logsigmoid(given))
    return win + torch.sigmoid(-h) * (F.logsigmoid(-h) - F.logsigmoid(-given))


def rpo_sq(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """(h - eta times the difference of the given scores)^2."""
    h, given = _margin_and_given(pairs)
    return (h - given) ** 2


def reward(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """Bradley-Terry on the scalar head: -log sigmoid(r_c - r_r - margin), and a pull of the rewards' sum to zero."""
    chosen, rejected = pairs.chosen(pairs.statistics.reward_R), pairs.rejected(pairs.statistics.reward_R)
    losses_P = smoothed(chosen - rejected - pairs.chosen(pairs.statistics.margin_R), pairs.wrong_P)
    return losses_P + pairs.options.reward_center_coef * (chosen + rejected) ** 2


def _rewards(pairs: Pairs) -> tuple[Tensor, Tensor]:
    return pairs.chosen(pairs.reward_R), pairs.rejected(pairs.reward_R)


def _margin_and_given(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """h without terms of its own, and eta times the difference of the row's scores."""
    chosen, rejected = _rewards(pairs)
    given_R = pairs.options.rpo_eta * pairs.statistics.given_score_R
    return chosen - rejected, pairs.chosen(given_R) - pairs.rejected(given_R)
