"""From per-response statistics to the loss of a global batch and its gradient with respect to them.

Several losses are added with their weights; an NLL term and WPO's weights apply where they are asked for. Every pair has the
exact weight 1 / (pairs in the global batch).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megadpo.config import ObjectiveConfig
from megadpo.objectives import coupled, custom, pairwise, reference_free
from megadpo.objectives.pairwise import PairLoss
from megadpo.objectives.specs import SPECS
from megadpo.objectives.statistics import DIFFERENTIABLE, ResponseStatistics
from megadpo.objectives.terms import Normalisers, Pairs

_MODULES = (pairwise, coupled, reference_free, custom)
LOSSES: dict[str, PairLoss] = {name: next(getattr(m, name) for m in _MODULES if hasattr(m, name)) for name in SPECS}
"""The function of every `objective.loss_type`."""


@dataclass(frozen=True)
class Evaluated:
    """An objective's value at the statistics at hand.

    Attributes:
        losses_P: float64, each pair's loss, unweighted by 1 / N.
        term_losses: each loss's own share of `losses_P`, before its weight, by name; "nll" for the NLL term.
        rewards_R: float64, what the metrics call rewards: beta times log-ratio, or times log-prob without a reference.
        loss: float64 scalar, this part's share of the global batch's loss.
        gradient_RD: float64, d loss / d statistic for each of `statistics.DIFFERENTIABLE`.
    """

    losses_P: Tensor
    term_losses: dict[str, Tensor]
    rewards_R: Tensor
    loss: Tensor
    gradient_RD: Tensor


def evaluate(statistics: ResponseStatistics, normalisers: Normalisers, options: ObjectiveConfig) -> Evaluated:
    """Loss of the responses at hand, and its gradient with respect to what can be differentiated in them."""
    leaves = {name: getattr(statistics, name).detach().requires_grad_() for name in DIFFERENTIABLE}
    with torch.enable_grad():
        pairs = Pairs(replace(statistics, **leaves), options)
        terms = term_losses(pairs, normalisers)
        weights = dict(zip(options.loss_types, options.weights, strict=True)) | {"nll": options.nll_coef}
        losses_P = sum((weights[name] * term_P for name, term_P in terms.items()), torch.zeros(()))
        assert isinstance(losses_P, Tensor)
        loss = (losses_P * statistics.weight_R[statistics.chosen_P]).sum() / normalisers.num_pairs
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    filled = [torch.zeros_like(statistics.logps_R) if gradient is None else gradient for gradient in gradients]
    return Evaluated(
        losses_P.detach(),
        {name: term_P.detach() for name, term_P in terms.items()},
        rewards(pairs).detach(),
        loss.detach(),
        torch.stack(filled, dim=-1),
    )


def term_losses(pairs: Pairs, normalisers: Normalisers) -> dict[str, Tensor]:
    """Each loss of the objective, one value a pair, before its weight."""
    options = pairs.options
    weight_P = wpo_weight(pairs) if options.wpo else None
    terms = {}
    for name in options.loss_types:
        term_P = LOSSES[name](pairs, normalisers)
        terms[name] = term_P if weight_P is None else term_P * weight_P
    if options.nll_coef:
        terms["nll"] = pairwise.sft(pairs, normalisers)
    return terms


def wpo_weight(pairs: Pairs) -> Tensor:
    """WPO (arXiv:2406.11827, eq. 2): exp of the mean of log p - log sum p^2, chosen times rejected; held fixed."""
    s = pairs.statistics
    mean_R = (s.token_logps_R - s.log_square_R).detach() / s.num_tokens_R.clamp(min=1)
    return pairs.chosen(mean_R).exp() * pairs.rejected(mean_R).exp()


def rewards(pairs: Pairs) -> Tensor:
    """The reward of every response, by the first of the losses: what `rewards/*` show."""
    name = pairs.options.loss_types[0]
    if SPECS[name].needs_reference or any(SPECS[other].needs_reference for other in pairs.options.loss_types):
        return pairs.options.beta * pairs.log_ratio_R
    values_R = pairs.statistics.token_logps_R if name in ("cpo", "sft") else pairs.mean_logp_R
    return pairs.options.beta * reference_free.alpha_reward(values_R, pairs.options.alphapo_alpha)
