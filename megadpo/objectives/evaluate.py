"""From per-response statistics to the loss of a global batch and its gradient with respect to them.

Several losses are added with their weights; an NLL term, WPO's weights and the rows' own weights apply where they are on.
Every unit (pair, list, example or labelled response) has the exact weight 1 / (units in the global batch).

Axes: R responses, U units, D statistics that can be differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megadpo.objectives.objective import Objective
from megadpo.objectives.statistics import DIFFERENTIABLE, ResponseStatistics
from megadpo.objectives.terms import Normalisers, Pairs, Responses


@dataclass(frozen=True)
class Evaluated:
    """An objective's value at the statistics at hand.

    Attributes:
        losses_U: float64, each unit's loss, its row's weight included, without the 1 / N.
        term_losses: each loss's own share of `losses_U`, before the weights, by name; "nll" for the NLL term.
        rewards_R: float64, what the metrics call rewards: beta times log-ratio, or times log-prob without a reference; of
            a reward model, its own.
        loss: float64 scalar, this part's share of the global batch's loss.
        gradient_RD: float64, d loss / d statistic for each of `statistics.DIFFERENTIABLE`.
    """

    losses_U: Tensor
    term_losses: dict[str, Tensor]
    rewards_R: Tensor
    loss: Tensor
    gradient_RD: Tensor


def evaluate(statistics: ResponseStatistics, normalisers: Normalisers, objective: Objective) -> Evaluated:
    """Loss of the responses at hand, and its gradient with respect to what can be differentiated in them."""
    leaves = {name: getattr(statistics, name).detach().requires_grad_() for name in DIFFERENTIABLE}
    with torch.enable_grad():
        responses = objective.responses(replace(statistics, **leaves))
        losses = term_losses(responses, normalisers, objective)
        sum_U = sum((term.weight * losses[term.name] for term in objective.terms), torch.zeros(()))
        losses_U = sum_U * responses.of_units(statistics.row_weight_R)
        loss = losses_U.sum() / normalisers.num_units
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    filled = [torch.zeros_like(statistics.logps_R) if gradient is None else gradient for gradient in gradients]
    return Evaluated(
        losses_U.detach(),
        {name: term_U.detach() for name, term_U in losses.items()},
        objective.reward(responses).detach(),
        loss.detach(),
        torch.stack(filled, dim=-1),
    )


def term_losses(responses: Responses, normalisers: Normalisers, objective: Objective) -> dict[str, Tensor]:
    """Each term of the objective, one value a unit, WPO's weights included where they are on, before the term's own."""
    losses = {term.name: term.function(responses, normalisers) for term in objective.terms}
    if objective.options.wpo:
        assert isinstance(responses, Pairs)
        weight_P = wpo_weight(responses)
        losses |= {term.name: losses[term.name] * weight_P for term in objective.terms if term.weighted_by_wpo}
    return losses


def wpo_weight(pairs: Pairs) -> Tensor:
    """WPO (arXiv:2406.11827, eq. 2): exp of the mean of log p - log sum p^2, chosen times rejected; held fixed."""
    s = pairs.statistics
    mean_R = (s.token_logps_R - s.log_square_R).detach() / s.num_tokens_R.clamp(min=1)
    return pairs.chosen(mean_R).exp() * pairs.rejected(mean_R).exp()
