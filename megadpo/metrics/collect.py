"""From per-response statistics to the metrics of a step, under the names and with the averages of TRL's DPOTrainer.

Everything is a numerator and a denominator that add up over micro-batches and ranks; a metric is their quotient at the
end, so it does not depend on how a batch was cut. Both travel as one float64 vector: one all-reduce a step.

What is averaged over what (TRL 1.16, `DPOTrainer._compute_loss`):

* ``loss``, ``rewards/*``, ``logps/*`` over pairs;
* ``logits/chosen``, ``logits/rejected`` over the chosen / rejected completion tokens, each the vocabulary's mean logit;
* ``entropy`` over all completion tokens, ``mean_token_accuracy`` over the chosen completion tokens only.

TRL takes the last two groups per forward pass and then the plain mean of the passes of a logging window; here they are
exact over the whole batch, which is the same number where a step is one pass.

Legend of the axis suffixes: R = responses, P = pairs, M = metrics in the order of `METRIC_SLOTS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megadpo.objectives.statistics import ResponseStatistics

METRIC_SLOTS: tuple[str, ...] = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
)

Sums = dict[str, tuple[float, float]]


def slots(terms: Sequence[str] = ()) -> tuple[str, ...]:
    """The metrics of an objective of the losses `terms`: of several, each has its own "loss/NAME"."""
    return METRIC_SLOTS + (tuple(f"loss/{name}" for name in terms) if len(terms) > 1 else ())


def sum_vector(
    statistics: ResponseStatistics, losses_P: Tensor, rewards_R: Tensor, terms: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Numerators and denominators of all metrics for the pairs at hand, without waiting for the device.

    Args:
        statistics: of the responses of one or more micro-batches; gradients are not followed.
        losses_P: float, the objective's unweighted loss of each pair.
        rewards_R: float, the objective's reward of each response (beta times the log-ratio, with a reference).

        terms: each loss's own losses_P, where there are several.

    Returns:
        float64 of shape [2 M], numerators first, on the statistics' device. Vectors of different pairs add up.
        A pair of weight 0 adds nothing, even if its statistics are not finite.
    """
    s = statistics
    weight_P = s.weight_R[s.chosen_P].detach().double()

    def chosen(values_R: Tensor) -> Tensor:
        return values_R.detach().double()[s.chosen_P]

    def rejected(values_R: Tensor) -> Tensor:
        return values_R.detach().double()[s.rejected_P]

    chosen_reward_P, rejected_reward_P = chosen(rewards_R), rejected(rewards_R)
    pairs_P = torch.ones_like(weight_P)
    both_tokens_P = chosen(s.num_tokens_R) + rejected(s.num_tokens_R)
    values: dict[str, tuple[Tensor, Tensor]] = {
        "loss": (losses_P.detach().double(), pairs_P),
        "rewards/chosen": (chosen_reward_P, pairs_P),
        "rewards/rejected": (rejected_reward_P, pairs_P),
        "rewards/accuracies": ((chosen_reward_P > rejected_reward_P).double(), pairs_P),
        "rewards/margins": (chosen_reward_P - rejected_reward_P, pairs_P),
        "logps/chosen": (chosen(s.logps_R), pairs_P),
        "logps/rejected": (rejected(s.logps_R), pairs_P),
        "logits/chosen": (chosen(s.mean_logit_R), chosen(s.num_tokens_R)),
        "logits/rejected": (rejected(s.mean_logit_R), rejected(s.num_tokens_R)),
        "entropy": (chosen(s.entropy_R) + rejected(s.entropy_R), both_tokens_P),
        "mean_token_accuracy": (chosen(s.num_correct_R), chosen(s.num_tokens_R)),
    }
    values |= {f"loss/{name}": (term_P.detach().double(), pairs_P) for name, term_P in (terms or {}).items()}
    values_2MP = torch.stack([values[name][part] for part in (0, 1) for name in slots(list(terms or {}))])
    # where, not a product alone: 0 * nan is nan, and filler may hold anything
    return torch.where(weight_P > 0, values_2MP * weight_P, 0.0).sum(dim=1)


def sums(statistics: ResponseStatistics, losses_P: Tensor, rewards_R: Tensor) -> Sums:
    """`sum_vector` as plain numbers: metric name -> (numerator, denominator)."""
    return from_vector(sum_vector(statistics, losses_P, rewards_R))


def empty_vector(device: torch.device | str = "cpu", terms: Sequence[str] = ()) -> Tensor:
    """The vector of no pairs, float64 [2 M]: what a rank without the model's last stage brings to the all-reduce."""
    return torch.zeros(2 * len(slots(terms)), dtype=torch.float64, device=device)


def to_vector(totals: Mapping[str, tuple[float, float]]) -> Tensor:
    """(numerator, denominator) per metric as a float64 vector of shape [2 M], numerators first."""
    return torch.tensor([totals[name][part] for part in (0, 1) for name in METRIC_SLOTS], dtype=torch.float64)


def from_vector(vector: Tensor, terms: Sequence[str] = ()) -> Sums:
    """The inverse of `to_vector`."""
    values, names = vector.tolist(), slots(terms)
    assert len(values) == 2 * len(names)
    return dict(zip(names, zip(values[: len(names)], values[len(names) :], strict=True), strict=True))


def add(left: Mapping[str, tuple[float, float]], right: Mapping[str, tuple[float, float]]) -> Sums:
    """The sums of two sets of pairs together."""
    return {name: (left[name][0] + right[name][0], left[name][1] + right[name][1]) for name in METRIC_SLOTS}


def reduce(totals: Mapping[str, tuple[float, float]], prefix: str = "") -> dict[str, float]:
    """The metrics: numerator / denominator, each name behind `prefix` ("eval_" for held-out pairs, as in TRL).

    A metric over nothing at all is nan: there is no honest number for it.
    """
    return {
        prefix + name: numerator / denominator if denominator else math.nan
        for name, (numerator, denominator) in totals.items()
    }
