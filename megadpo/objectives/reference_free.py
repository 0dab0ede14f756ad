"""Pairwise losses without a reference: CPO, SimPO, AlphaPO, ORPO.

The supervised term that CPO adds is `objective.nll_coef` (TRL's cpo_alpha), that of ORPO is part of its definition.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megadpo.objectives.terms import Normalisers, Pairs, log1mexp, smoothed


def cpo(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """-log sigmoid(beta x), x the difference of summed log-probs (of AlphaPO's rewards of them, with an alpha)."""
    reward_R = alpha_reward(pairs.statistics.token_logps_R, pairs.options.alphapo_alpha)
    x = pairs.chosen(reward_R) - pairs.rejected(reward_R)
    return smoothed(pairs.options.beta * x, pairs.wrong_P)


def simpo(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """-log sigmoid(beta x - gamma), x the difference of mean log-probs (or of AlphaPO's rewards of them)."""
    reward_R = alpha_reward(pairs.mean_logp_R, pairs.options.alphapo_alpha)
    x = pairs.chosen(reward_R) - pairs.rejected(reward_R)
    return smoothed(pairs.options.beta * x - pairs.options.simpo_gamma, pairs.wrong_P)


def orpo(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """Negative log-prob of prompt and chosen answer, minus beta log sigmoid of the log odds ratio of mean log-probs."""
    s = pairs.statistics
    # A probability of 1 has infinite odds.
    mean_logp_R = pairs.mean_logp_R.clamp(max=-1e-10)
    chosen, rejected = pairs.chosen(mean_logp_R), pairs.rejected(mean_logp_R)
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    share = normalisers.num_units / max(1, normalisers.num_chosen_sequence_tokens)
    nll_P = -share * pairs.chosen(s.token_logps_R + s.prompt_logps_R)
    return nll_P - pairs.options.beta * F.logsigmoid(log_odds)


def alpha_reward(logp: Tensor, alpha: float) -> Tensor:
    """AlphaPO's (1 - p^-alpha) / alpha; the log-prob itself for alpha = 0, its limit."""
    return (1 - (-alpha * logp).exp()) / alpha if alpha else logp
