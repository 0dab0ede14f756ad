"""Losses of two or more ranked responses of a prompt: one loss a list. With two responses each is DPO's.

s is beta times a response's log-ratio of policy to reference; responses come best first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megadpo.objectives.terms import Lists, Normalisers

_NOTHING = -1e30
"""The score of a response that is not there: exp of it is 0, and unlike -inf it has a gradient."""


def plackett_luce(lists: Lists, normalisers: Normalisers) -> Tensor:
    """-sum over places of log softmax of the place's response among those that are left (DPO, arXiv:2305.18290, A.3)."""
    scores_LK = lists.rows(lists.reward_R, _NOTHING)
    left_LK = scores_LK.flip(1).logcumsumexp(1).flip(1)
    return (left_LK - scores_LK).masked_fill(~lists.is_there_LK, 0.0).sum(1)


def best_vs_rest(lists: Lists, normalisers: Normalisers) -> Tensor:
    """-log softmax of the best response among all (S-DPO, arXiv:2406.09215)."""
    scores_LK = lists.rows(lists.reward_R, _NOTHING)
    return scores_LK.logsumexp(1) - scores_LK[:, 0]


def all_pairs(lists: Lists, normalisers: Normalisers) -> Tensor:
    """-log sigmoid(s_i - s_j) of every two responses of which i has the higher score: their weighted mean.

    `list_weights`: all the same, by the difference of given scores, or LiPO's (arXiv:2402.01878), whose losses are
    summed as they are defined there.
    """
    scores_LK, given_LK = lists.rows(lists.reward_R), lists.rows(lists.statistics.given_score_R)
    better_LKK = given_LK[:, :, None] > given_LK[:, None, :]
    better_LKK = better_LKK & lists.is_there_LK[:, :, None] & lists.is_there_LK[:, None, :]
    losses_LKK = -F.logsigmoid(scores_LK[:, :, None] - scores_LK[:, None, :])
    kind = lists.options.list_weights
    if kind == "lambda":
        weights_LKK = _lambda_weights(lists, given_LK) * better_LKK
        return (weights_LKK * losses_LKK).sum((1, 2))
    gaps_LKK = given_LK[:, :, None] - given_LK[:, None, :] if kind == "score" else torch.ones_like(losses_LKK)
    weights_LKK = gaps_LKK * better_LKK
    return (weights_LKK * losses_LKK).sum((1, 2)) / weights_LKK.sum((1, 2))


def _lambda_weights(lists: Lists, given_LK: Tensor) -> Tensor:
    """|difference of gains 2^score| x |difference of discounts at the places the policy gives|, held fixed."""
    scores_LK = lists.rows(lists.reward_R.detach(), _NOTHING)
    place_LK = scores_LK.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1
    discount_LK = 1 / torch.log1p(place_LK.double())
    gain_LK = torch.exp2(given_LK)
    return (gain_LK[:, :, None] - gain_LK[:, None, :]).abs() * (discount_LK[:, :, None] - discount_LK[:, None, :]).abs()
