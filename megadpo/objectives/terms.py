"""What the losses are made of: the quantities of a pair, the f-divergence scores, the numerically careful functions.

Axes: R responses, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from megadpo.config import ObjectiveConfig
from megadpo.data.store import GroupStore
from megadpo.objectives.statistics import ResponseStatistics

ALPHA_CLAMP = 80.0
"""Largest exponent of the alpha-divergence, TRL's for fp32."""


@dataclass(frozen=True)
class Normalisers:
    """What a loss is divided by: known from the data before the step, the same on every rank.

    Attributes:
        num_pairs: preference pairs in the global batch.
        num_chosen_tokens: scored completion tokens of all its chosen responses.
        num_chosen_sequence_tokens: the same with the scored prompt tokens, where prompts are scored.
    """

    num_pairs: int
    num_chosen_tokens: int = 1
    num_chosen_sequence_tokens: int = 1


def normalisers_of(groups: GroupStore, numbers: Sequence[int] | npt.NDArray[np.int64]) -> Normalisers:
    """The normalisers of a global batch of the groups `numbers`."""
    chosen = np.asarray(numbers, np.int64)
    responses, prompts = groups.chosen_lengths(chosen)
    scored = responses - (prompts == 0)
    return Normalisers(len(chosen), int(scored.sum()), int((scored + np.maximum(prompts - 1, 0)).sum()))


@dataclass(frozen=True)
class Pairs:
    """The statistics as the losses read them, pair by pair.

    Notation as in the papers: z is a response's policy log-prob minus its reference log-prob.
    """

    statistics: ResponseStatistics
    options: ObjectiveConfig

    def chosen(self, values_R: Tensor) -> Tensor:
        """Each pair's chosen value."""
        return values_R[self.statistics.chosen_P]

    def rejected(self, values_R: Tensor) -> Tensor:
        """Each pair's rejected value."""
        return values_R[self.statistics.rejected_P]

    @cached_property
    def log_ratio_R(self) -> Tensor:
        """z of every response."""
        return self.statistics.logps_R - self.statistics.reference_logps_R

    @cached_property
    def score_R(self) -> Tensor:
        """g(z): the log-ratio seen through the f-divergence."""
        return divergence_score(self.log_ratio_R, self.options.f_divergence, self.options.f_alpha)

    @cached_property
    def scaled_margin_P(self) -> Tensor:
        """h = beta (g(z_chosen) - g(z_rejected)), with the terms that change a pair's margin."""
        options = self.options
        margin_P = self.chosen(self.score_R) - self.rejected(self.score_R)
        if options.dpop_lambda:
            # Smaug (arXiv:2402.13228, eq. 3): a chosen answer below the reference counts against the pair.
            margin_P = margin_P - options.dpop_lambda * F.relu(-self.chosen(self.log_ratio_R))
        scaled_P = options.beta * margin_P
        if options.length_penalty:
            # R-DPO (arXiv:2403.19159, eq. 9): longer chosen answers are given a head start.
            lengths_R = self.statistics.num_completion_tokens_R
            scaled_P = scaled_P + options.length_penalty * (self.chosen(lengths_R) - self.rejected(lengths_R))
        return scaled_P

    @cached_property
    def mean_logp_R(self) -> Tensor:
        """Mean log-prob of every response's scored completion tokens."""
        return self.statistics.token_logps_R / self.statistics.num_tokens_R.clamp(min=1)

    def per_token(self, values_R: Tensor) -> Tensor:
        """Values divided by the number of completion tokens."""
        return values_R / self.statistics.num_completion_tokens_R.clamp(min=1)


def divergence_score(log_ratio: Tensor, name: str, alpha: float) -> Tensor:
    """g(z) = f'(exp z) up to a constant, for the f-divergence that the policy is held to (f-DPO, arXiv:2309.16240)."""
    if name == "reverse_kl":
        return log_ratio
    if name == "forward_kl":
        return 1 - torch.exp(-log_ratio)
    if name == "js":
        return math.log(2) + F.logsigmoid(log_ratio)
    assert name == "alpha", name
    power = alpha - 1
    if abs(power) < 1e-6:
        return log_ratio
    return (torch.exp((power * log_ratio).clamp(max=ALPHA_CLAMP)) - 1) / power


def smoothed(logits: Tensor, smoothing: float) -> Tensor:
    """-(1 - eps) log sigmoid(x) - eps log sigmoid(-x): the label is right with probability 1 - eps."""
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation at either end (Maechler 2012)."""
    near_zero = x > -math.log(2)
    # where() evaluates both branches: each gets arguments it can stand, so that no gradient is nan.
    left = torch.log(-torch.expm1(torch.where(near_zero, x, torch.full_like(x, -1.0))))
    right = torch.log1p(-torch.exp(torch.where(near_zero, torch.full_like(x, -1.0), x)))
    return torch.where(near_zero, left, right)
