"""Losses of single responses that are labelled desirable or undesirable: one loss a response.

z is a response's log-ratio of policy to reference, b is beta.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megadpo.objectives.terms import Normalisers, Responses


def kto(responses: Responses, normalisers: Normalisers) -> Tensor:
    """1 - sigmoid(b (z - kl)), undesirable: 1 - sigmoid(b (kl - z)); kl is measured on mismatched answers, held fixed."""
    above_kl_R = responses.reward_R - responses.options.beta * normalisers.kl
    return _weighted(responses, 1 - torch.sigmoid(_signs(responses) * above_kl_R))


def apo_zero_unpaired(responses: Responses, normalisers: Normalisers) -> Tensor:
    """1 - sigmoid(b z), undesirable: sigmoid(b z)."""
    return _weighted(responses, 1 - torch.sigmoid(_signs(responses) * responses.reward_R))


def bco(responses: Responses, normalisers: Normalisers) -> Tensor:
    """-log sigmoid(b z - delta), undesirable: -log sigmoid(-(b z - delta)); delta is the running mean of all b z."""
    return _weighted(responses, -F.logsigmoid(_signs(responses) * (responses.reward_R - normalisers.delta)))


def _signs(responses: Responses) -> Tensor:
    """1 for desirable, -1 for undesirable responses."""
    return 2 * responses.statistics.label_R - 1


def _weighted(responses: Responses, losses_R: Tensor) -> Tensor:
    options, label_R = responses.options, responses.statistics.label_R
    return losses_R * (label_R * options.desirable_weight + (1 - label_R) * options.undesirable_weight)
