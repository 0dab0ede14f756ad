"""From per-response statistics to the loss of a global batch and its gradient with respect to them.

Several losses are added with their weights; an NLL term, WPO's weights and the rows' own weights apply where they are asked
for. Every unit (pair, list, example or labelled response) has the exact weight 1 / (units in the global batch).

Axes: R responses, U units, D statistics that can be differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megadpo.config.schema import ObjectiveConfig
from megadpo.objectives import coupled, custom, listwise, pairwise, reference_free, supervised, unpaired
from megadpo.objectives.specs import SPECS, kind_of, needs_reference
from megadpo.objectives.statistics import DIFFERENTIABLE, ResponseStatistics
from megadpo.objectives.terms import Lists, Normalisers, Pairs, Responses

_MODULES = (pairwise, coupled, reference_free, custom, unpaired, listwise, supervised)
LOSSES: dict[str, Callable[[Any, Normalisers], Tensor]] = {
    name: next(getattr(m, name) for m in _MODULES if hasattr(m, name)) for name in SPECS
}
"""The function of every `objective.loss_type`."""


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


def evaluate(statistics: ResponseStatistics, normalisers: Normalisers, options: ObjectiveConfig) -> Evaluated:
    """Loss of the responses at hand, and its gradient with respect to what can be differentiated in them."""
    leaves = {name: getattr(statistics, name).detach().requires_grad_() for name in DIFFERENTIABLE}
    with torch.enable_grad():
        responses = responses_of(replace(statistics, **leaves), options)
        terms = term_losses(responses, normalisers)
        weights = dict(zip(options.loss_types, options.weights, strict=True)) | {"nll": options.nll_coef}
        sum_U = sum((weights[name] * term_U for name, term_U in terms.items()), torch.zeros(()))
        losses_U = sum_U * of_units(statistics, statistics.row_weight_R, options)
        loss = losses_U.sum() / normalisers.num_units
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    filled = [torch.zeros_like(statistics.logps_R) if gradient is None else gradient for gradient in gradients]
    return Evaluated(
        losses_U.detach(),
        {name: term_U.detach() for name, term_U in terms.items()},
        rewards(responses).detach(),
        loss.detach(),
        torch.stack(filled, dim=-1),
    )


def responses_of(statistics: ResponseStatistics, options: ObjectiveConfig) -> Responses:
    """The statistics as losses of the kind at hand read them."""
    views = {"pairs": Pairs, "lists": Lists}
    return views.get(kind_of(options.loss_types), Responses)(statistics, options)


def of_units(statistics: ResponseStatistics, values_R: Tensor, options: ObjectiveConfig) -> Tensor:
    """[U]: the values of each unit's first response. Labelled responses are units each by itself."""
    return values_R if kind_of(options.loss_types) == "labels" else values_R[statistics.first_G]


def term_losses(responses: Responses, normalisers: Normalisers) -> dict[str, Tensor]:
    """Each loss of the objective, one value a unit, before its weight."""
    options = responses.options
    terms = {}
    for name in options.loss_types:
        if name == "sft":
            terms[name] = of_units(responses.statistics, supervised.sft(responses, normalisers), options)
        else:
            terms[name] = LOSSES[name](responses, normalisers)
    if options.wpo:
        assert isinstance(responses, Pairs)
        weight_P = wpo_weight(responses)
        terms = {name: term_P * weight_P for name, term_P in terms.items()}
    if options.nll_coef:
        terms["nll"] = of_units(responses.statistics, supervised.sft(responses, normalisers), options)
    return terms


def wpo_weight(pairs: Pairs) -> Tensor:
    """WPO (arXiv:2406.11827, eq. 2): exp of the mean of log p - log sum p^2, chosen times rejected; held fixed."""
    s = pairs.statistics
    mean_R = (s.token_logps_R - s.log_square_R).detach() / s.num_tokens_R.clamp(min=1)
    return pairs.chosen(mean_R).exp() * pairs.rejected(mean_R).exp()


def rewards(responses: Responses) -> Tensor:
    """The reward of every response, by the first of the losses: what `rewards/*` show."""
    options = responses.options
    name = options.loss_types[0]
    if name == "reward":
        return responses.statistics.reward_R
    if needs_reference(options.loss_types):
        return responses.reward_R
    values_R = responses.statistics.token_logps_R if name in ("cpo", "sft") else responses.mean_logp_R
    return options.beta * reference_free.alpha_reward(values_R, options.alphapo_alpha)
