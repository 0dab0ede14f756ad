"""From per-response statistics to the metrics of a step, under the names and with the averages of TRL's DPOTrainer.

Everything is a numerator and a denominator that add up over micro-batches and ranks; a metric is their quotient at the
end, so it does not depend on how a batch was cut. Both travel as one float64 vector: one all-reduce a step.

What is averaged over what (TRL 1.16, `DPOTrainer._compute_loss`):

* ``loss``, ``rewards/*``, ``logps/*`` over pairs;
* ``logits/chosen``, ``logits/rejected`` over the chosen / rejected completion tokens, each the vocabulary's mean logit;
* ``entropy`` over all completion tokens, ``mean_token_accuracy`` over the chosen completion tokens only;
* ``rewards/margins_chosen_longer``, ``rewards/margins_chosen_shorter`` (which TRL does not have) over the pairs whose chosen
  answer has more, or fewer, scored tokens than the rejected one; a batch without such pairs does not have them.

TRL takes the last two groups per forward pass and then the plain mean of the passes of a logging window; here they are
exact over the whole batch, which is the same number where a step is one pass.

Of lists, "chosen" is the best response and "rejected" the mean of the others; of labelled answers, the mean over the
desirable and over the undesirable ones (TRL's KTOTrainer). What an objective has no number for has no metric.

Legend of the axis suffixes: R = responses, G = groups, U = units (see objectives/evaluate.py), M = metrics in the order
of `Objective.metric_names`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megadpo.objectives.evaluate import Evaluated
from megadpo.objectives.objective import BY_LENGTH, Objective
from megadpo.objectives.statistics import ResponseStatistics


def sum_vector(statistics: ResponseStatistics, evaluated: Evaluated, objective: Objective) -> Tensor:
    """Numerators and denominators of all metrics for the groups at hand, without waiting for the device.

    Args:
        statistics: of the responses of one or more micro-batches; gradients are not followed.
        evaluated: the objective's value there.

    Returns:
        float64 of shape [2 M], numerators first, on the statistics' device. Vectors of different groups add up.
    """
    s = statistics
    ones_U = torch.ones_like(evaluated.losses_U)
    values: dict[str, tuple[Tensor, Tensor]] = {"loss": (evaluated.losses_U, ones_U)}
    values |= {f"loss/{name}": (term_U, ones_U) for name, term_U in evaluated.term_losses.items()}
    for side, is_on_side_R, weight_R in _sides(s, objective.kind):
        values[f"rewards/{side}"] = (evaluated.rewards_R * weight_R, weight_R)
        values[f"logps/{side}"] = (s.logps_R * weight_R, weight_R)
        values[f"logits/{side}"] = (s.mean_logit_R * is_on_side_R, s.num_tokens_R * is_on_side_R)
        if side == "chosen":
            values["mean_token_accuracy"] = (s.num_correct_R * is_on_side_R, s.num_tokens_R * is_on_side_R)
    values["entropy"] = (s.entropy_R, s.num_tokens_R)
    if "rewards/margins" in objective.metric_names:
        values |= _compared(s, evaluated.rewards_R)
    if BY_LENGTH[0] in objective.metric_names:
        values |= _margins_by_length(s, evaluated.rewards_R)
    nothing = torch.zeros(1, dtype=torch.float64, device=s.logps_R.device)
    parts = [values.get(name, (nothing, nothing))[part] for part in (0, 1) for name in objective.metric_names]
    return torch.stack([part.detach().double().sum() for part in parts])


def _sides(s: ResponseStatistics, kind: str) -> list[tuple[str, Tensor, Tensor]]:
    """(side, 1 for its responses, their weight in a mean over units) of chosen and rejected."""
    if kind == "labels":
        return [(side, is_R, is_R) for side, is_R in (("chosen", s.label_R), ("rejected", 1 - s.label_R))]
    first_R = torch.zeros_like(s.logps_R).index_fill_(0, s.first_G, 1.0)
    others_G = (s.num_responses_G - 1).clamp(min=1)
    share_R = (1 - first_R) / _of_responses(others_G, s)
    return [("chosen", first_R, first_R), ("rejected", 1 - first_R, share_R)]


def _compared(s: ResponseStatistics, rewards_R: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Margin of the first response over the mean of the others, and whether it is above all of them."""
    (_, first_R, _), (_, _, share_R) = _sides(s, "pairs")
    group_R = _of_responses(torch.arange(len(s.first_G), device=rewards_R.device), s)
    lowest = torch.full((len(s.first_G),), -torch.inf, dtype=rewards_R.dtype, device=rewards_R.device)
    others_R = rewards_R.masked_fill(first_R > 0, -torch.inf)
    best_other_G = lowest.scatter_reduce(0, group_R, others_R, "amax")
    first_G, ones_G = rewards_R[s.first_G], torch.ones_like(lowest)
    return {
        "rewards/accuracies": ((first_G > best_other_G).double(), ones_G),
        "rewards/margins": (first_G.sum() - (rewards_R * share_R).sum(), ones_G),
    }


def _margins_by_length(s: ResponseStatistics, rewards_R: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Margin of the pairs whose chosen answer is the longer one, and of those where it is the shorter one."""
    margin_P = rewards_R[s.chosen_P] - rewards_R[s.rejected_P]
    excess_P = s.num_tokens_R[s.chosen_P] - s.num_tokens_R[s.rejected_P]
    return {
        name: (margin_P.masked_fill(~is_P, 0.0), is_P.double())
        for name, is_P in zip(BY_LENGTH, (excess_P > 0, excess_P < 0), strict=True)
    }


def _of_responses(values_G: Tensor, s: ResponseStatistics) -> Tensor:
    """[R]: each group's value for each of its responses; their number is said, which a GPU would be waited for else."""
    return values_G.repeat_interleave(s.num_responses_G, output_size=len(s.logps_R))


def scalar_sums(name: str, value: Tensor | float, objective: Objective, device: torch.device | str) -> Tensor:
    """The vector of one observation of a scalar of the whole batch ("kl", "delta")."""
    vector, place = empty_vector(device, objective), objective.metric_names.index(name)
    vector[place] = value
    vector[len(objective.metric_names) + place] = 1
    return vector


def empty_vector(device: torch.device | str, objective: Objective) -> Tensor:
    """The vector of no groups, float64 [2 M]: what a rank without the model's last stage brings to the all-reduce."""
    return torch.zeros(2 * len(objective.metric_names), dtype=torch.float64, device=device)


def reduce(vector: Tensor | list[float], objective: Objective, prefix: str = "") -> dict[str, float]:
    """The metrics: numerator / denominator, each name behind `prefix` ("eval_" for held-out rows, as in TRL).

    A metric over nothing at all is nan: there is no honest number for it. One of `BY_LENGTH` is left out.
    """
    values = vector.tolist() if isinstance(vector, Tensor) else vector
    names = objective.metric_names
    pairs = zip(names, values[: len(names)], values[len(names) :], strict=True)
    metrics = {name: numerator / denominator if denominator else math.nan for name, numerator, denominator in pairs}
    if "rewards/rejected" in metrics and "rewards/margins" not in metrics:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    for name, denominator in zip(names, values[len(names) :], strict=True):
        if name in BY_LENGTH and not denominator:
            del metrics[name]
    return {prefix + name: value for name, value in metrics.items()}
