"""Preference losses as pure functions of per-response statistics: no model, no process group, no micro-batch.

An objective maps the statistics of the responses at hand and the normalisers of the global batch to one loss a pair.
`evaluate` adds them up with the exact weight 1 / (pairs in the global batch) and differentiates with respect to the
policy's log-probs; the engine then carries that gradient into the model.

Notation (R responses, P pairs): z = policy log-prob minus reference log-prob of a response, margin = z_chosen - z_rejected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megadpo.config import ObjectiveConfig
from megadpo.objectives.statistics import ResponseStatistics


@dataclass(frozen=True)
class Normalisers:
    """What a loss is divided by: known from the data before the step, the same on every rank.

    Attributes:
        num_pairs: preference pairs in the global batch.
    """

    num_pairs: int


@dataclass(frozen=True)
class Evaluated:
    """An objective's value at the statistics at hand.

    Attributes:
        losses_P: float64, each pair's loss, unweighted.
        loss: float64 scalar, this part's share of the global batch's loss.
        gradient_R: float64, d loss / d logps_R.
    """

    losses_P: Tensor
    loss: Tensor
    gradient_R: Tensor


Objective = Callable[[ResponseStatistics, Normalisers, ObjectiveConfig], Tensor]


def sigmoid(statistics: ResponseStatistics, normalisers: Normalisers, options: ObjectiveConfig) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7): -log sigmoid(beta margin), with cDPO's label smoothing (Mitchell 2023)."""
    log_ratio_R = statistics.logps_R - statistics.reference_logps_R
    scaled_P = options.beta * (log_ratio_R[statistics.chosen_P] - log_ratio_R[statistics.rejected_P])
    smoothing = options.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(scaled_P) - smoothing * F.logsigmoid(-scaled_P)


OBJECTIVES: dict[str, Objective] = {"sigmoid": sigmoid}
"""Every `objective.loss_type`."""


def evaluate(statistics: ResponseStatistics, normalisers: Normalisers, options: ObjectiveConfig) -> Evaluated:
    """Loss of the responses at hand and its gradient with respect to the policy's log-probs."""
    logps_R = statistics.logps_R.detach().requires_grad_()
    with torch.enable_grad():
        leaf = replace(statistics, logps_R=logps_R)
        losses_P = OBJECTIVES[options.loss_type](leaf, normalisers, options)
        loss = (losses_P * statistics.weight_R[statistics.chosen_P]).sum() / normalisers.num_pairs
    (gradient_R,) = torch.autograd.grad(loss, logps_R)
    return Evaluated(losses_P.detach(), loss.detach(), gradient_R)
