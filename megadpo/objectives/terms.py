"""What the losses are made of: the quantities of responses, pairs and lists, and the numerically careful functions.

Axes: R responses, G groups, P pairs, L lists (both are groups), K places in a list, best first.
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

from megadpo.config.schema import ObjectiveConfig
from megadpo.data.store import GroupStore
from megadpo.objectives.statistics import ResponseStatistics

ALPHA_CLAMP = 80.0
"""Largest exponent of the alpha-divergence, TRL's for fp32."""


@dataclass(frozen=True)
class Normalisers:
    """What a loss is divided by: known from the data before the step, the same on every rank.

    Attributes:
        num_units: what the global batch has losses of: pairs, lists, examples, or single labelled responses.
        num_chosen_tokens: scored completion tokens of its supervised responses: the chosen, best, desirable or only ones.
        num_chosen_sequence_tokens: the same with the scored prompt tokens, where prompts are scored.
        kl: KTO's estimate of how far the policy is from the reference, in nats; held fixed.
        delta: BCO's shift of the rewards, held fixed.
    """

    num_units: int
    num_chosen_tokens: int = 1
    num_chosen_sequence_tokens: int = 1
    kl: Tensor | float = 0.0
    delta: Tensor | float = 0.0


def normalisers_of(groups: GroupStore, group_ids: Sequence[int] | npt.NDArray[np.int64]) -> Normalisers:
    """The normalisers of a global batch of the groups `group_ids`."""
    chosen = np.asarray(group_ids, np.int64)
    responses, prompts = groups.chosen_lengths(chosen)
    scored = responses - (prompts == 0)
    num_units = len(chosen)
    label_R = groups.row_values.get("label")
    if label_R is not None:
        offsets_G = groups.response_offsets_G
        num_units = int((offsets_G[chosen + 1] - offsets_G[chosen]).sum())
        scored = scored * (label_R[offsets_G[chosen]] > 0)
    return Normalisers(num_units, int(scored.sum()), int((scored + np.maximum(prompts - 1, 0)).sum()))


@dataclass(frozen=True)
class Responses:
    """The statistics as the losses read them, response by response.

    Notation as in the papers: z is a response's policy log-prob minus its reference log-prob.
    """

    statistics: ResponseStatistics
    options: ObjectiveConfig

    @cached_property
    def log_ratio_R(self) -> Tensor:
        """z of every response."""
        return self.statistics.logps_R - self.statistics.reference_logps_R

    @cached_property
    def score_R(self) -> Tensor:
        """g(z): the log-ratio seen through the f-divergence."""
        return divergence_score(self.log_ratio_R, self.options.f_divergence, self.options.f_alpha)

    @cached_property
    def reward_R(self) -> Tensor:
        """beta z: DPO's implicit reward."""
        return self.options.beta * self.log_ratio_R

    @cached_property
    def mean_logp_R(self) -> Tensor:
        """Mean log-prob of every response's scored completion tokens."""
        return self.statistics.token_logps_R / self.statistics.num_tokens_R.clamp(min=1)

    def of_units(self, values_R: Tensor) -> Tensor:
        """[U]: the values of each unit's first response."""
        return values_R[self.statistics.first_G]

    def per_token(self, values_R: Tensor) -> Tensor:
        """Values divided by the number of completion tokens."""
        return values_R / self.statistics.num_completion_tokens_R.clamp(min=1)


@dataclass(frozen=True)
class Answers(Responses):
    """Labelled answers, each of which is a unit by itself."""

    def of_units(self, values_R: Tensor) -> Tensor:
        """The values themselves."""
        return values_R


@dataclass(frozen=True)
class Pairs(Responses):
    """Two responses a group: the chosen one and the rejected one."""

    def chosen(self, values_R: Tensor) -> Tensor:
        """Each pair's chosen value."""
        return values_R[self.statistics.chosen_P]

    def rejected(self, values_R: Tensor) -> Tensor:
        """Each pair's rejected value."""
        return values_R[self.statistics.rejected_P]

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
        # ODPO (arXiv:2402.10571, eq. 8): the better the chosen answer is said to be, the further apart they must come.
        return scaled_P - self.chosen(self.statistics.margin_R)

    @cached_property
    def wrong_P(self) -> Tensor:
        """Probability that a pair's label is wrong: the row's own (soft labels), flipped with `label_smoothing`."""
        right_P, flipped = self.chosen(self.statistics.label_probability_R), self.options.label_smoothing
        return right_P * flipped + (1 - right_P) * (1 - flipped)


@dataclass(frozen=True)
class Lists(Responses):
    """Groups of two or more ranked responses, as padded rows."""

    @cached_property
    def is_there_LK(self) -> Tensor:
        """bool, where a list has a response."""
        num_responses_L = self.statistics.num_responses_G
        places_K = torch.arange(int(num_responses_L.max()) if len(num_responses_L) else 0, device=num_responses_L.device)
        return places_K < num_responses_L[:, None]

    def rows(self, values_R: Tensor, fill: float = 0.0) -> Tensor:
        """Values [L, K], `fill` where a list has no response."""
        places_K = torch.arange(self.is_there_LK.shape[1], device=values_R.device)
        index_LK = (self.statistics.first_G[:, None] + places_K).clamp(max=max(len(values_R) - 1, 0))
        return values_R[index_LK].masked_fill(~self.is_there_LK, fill)


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


def smoothed(logits: Tensor, smoothing: float | Tensor) -> Tensor:
    """-(1 - eps) log sigmoid(x) - eps log sigmoid(-x): the label is right with probability 1 - eps."""
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation at either end (Maechler 2012)."""
    near_zero = x > -math.log(2)
    # where() evaluates both branches: each gets arguments it can stand, so that no gradient is nan.
    left = torch.log(-torch.expm1(torch.where(near_zero, x, torch.full_like(x, -1.0))))
    right = torch.log1p(-torch.exp(torch.where(near_zero, torch.full_like(x, -1.0), x)))
    return torch.where(near_zero, left, right)
