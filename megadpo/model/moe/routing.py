"""From a router's logits to a token's experts, as transformers' Mixtral, DeepSeek-V2, DeepSeek-V3 and Llama 4 do.

Not by Megatron's `topk_routing_with_score_function`, which gives other numbers in three places: it scores a group by the sum
of its best `topk / group_topk` experts, where DeepSeek-V2 takes the best and DeepSeek-V3 the best two; it always scales
sigmoids to add up to 1; and it rounds them to the logits' type.

Axes: T tokens, E experts, K experts of a token, G groups of experts, M experts of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megadpo.model.shape import Routing

SMALLEST_SUM = 1e-20
"""Added to a sum of scores before it divides them: sigmoids may all be 0."""


@dataclass(frozen=True)
class Routed:
    """What becomes of a lot of tokens.

    Attributes:
        probabilities_TE: float32, what each expert counts; zero where it is not chosen.
        chosen_TE: boolean.
        shares_TE: float32, each expert's part of all scores of a token, which load balancing is about.
        expert_TK: numbers of those that are chosen.
        agreed_TE: those of the chosen that the router would have chosen itself: all, unless it was told which to take.
    """

    probabilities_TE: Tensor
    chosen_TE: Tensor
    shares_TE: Tensor
    expert_TK: Tensor
    agreed_TE: Tensor


def route(
    logits_TE: Tensor,
    routing: Routing,
    per_token: int,
    correction_bias_E: Tensor | None = None,
    replayed_TK: Tensor | None = None,
) -> Routed:
    """Choose `per_token` experts of each token.

    Args:
        logits_TE: of any floating type; all else is float32.
        correction_bias_E: float32, where `routing` has one.
        replayed_TK: int64, the experts to take; None: those that the scores say.
    """
    if routing.score_function == "softmax":
        scores_TE = shares_TE = logits_TE.softmax(dim=-1, dtype=torch.float32)
    else:
        scores_TE = logits_TE.float().sigmoid()
        shares_TE = scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + SMALLEST_SUM)
    with torch.no_grad():
        choice_TE = logits_TE if routing.chooses_by_logits else scores_TE
        if correction_bias_E is not None:
            choice_TE = choice_TE + correction_bias_E
        if routing.groups_per_token < routing.num_groups:
            choice_TE = _of_best_groups(choice_TE, routing)
        own_TK = choice_TE.topk(per_token, dim=-1).indices
    expert_TK = own_TK if replayed_TK is None else replayed_TK
    top_TK = scores_TE.gather(1, expert_TK)
    if routing.renormalised:
        top_TK = top_TK / (top_TK.sum(dim=-1, keepdim=True) + SMALLEST_SUM)
    if routing.scaling_factor != 1.0:
        top_TK = top_TK * routing.scaling_factor
    probabilities_TE = torch.zeros_like(scores_TE).scatter(1, expert_TK, top_TK)
    chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, expert_TK, True)
    agreed_TE = chosen_TE
    if replayed_TK is not None:
        agreed_TE = torch.zeros_like(chosen_TE).scatter(1, own_TK, True) & chosen_TE
    return Routed(probabilities_TE, chosen_TE, shares_TE, expert_TK, agreed_TE)


def _of_best_groups(choice_TE: Tensor, routing: Routing) -> Tensor:
    """With minus infinity for the experts of groups that are not a token's."""
    choice_TGM = choice_TE.unflatten(1, (routing.num_groups, -1))
    best_TG = choice_TGM.amax(-1) if routing.group_score == "max" else choice_TGM.topk(2, dim=-1).values.sum(-1)
    group_TK = best_TG.topk(routing.groups_per_token, dim=-1).indices
    is_left_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter(1, group_TK, True)
    return choice_TGM.masked_fill(~is_left_TG[..., None], -torch.inf).flatten(1)
