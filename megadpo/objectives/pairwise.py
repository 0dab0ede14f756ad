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


def sigmoid(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """DPO: -log sigmoid(h); with eps, conservative DPO."""
    return smoothed(pairs.scaled_margin_P, pairs.options.label_smoothing)


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
    """-log sigmoid(b z_c) - log sigmoid(-b z_r): the two sides apart."""
    chosen, rejected = _rewards(pairs)
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


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
    mix = torch.sigmoid(h / pairs.options.discopop_tau)
    return -F.logsigmoid(h) * (1 - mix) + torch.exp(-h) * mix


def sft(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """Each pair's part of the mean negative log-prob over all chosen completion tokens of the global batch."""
    share = normalisers.num_pairs / max(1, normalisers.num_chosen_tokens)
    return -share * pairs.chosen(pairs.statistics.token_logps_R)


def _rewards(pairs: Pairs) -> tuple[Tensor, Tensor]:
    beta = pairs.options.beta
    return beta * pairs.chosen(pairs.log_ratio_R), beta * pairs.rejected(pairs.log_ratio_R)
