"""Losses in which pairs of the global batch depend on each other: they are evaluated on all of its pairs at once."""

from __future__ import annotations

from torch import Tensor

from megadpo.objectives.terms import Normalisers, Pairs, smoothed


def aot(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """Sorted log-ratios of chosen over rejected under the policy, against those under the reference."""
    s = pairs.statistics
    policy_P = (pairs.chosen(s.logps_R) - pairs.rejected(s.logps_R)).sort().values
    reference_P = (pairs.chosen(s.reference_logps_R) - pairs.rejected(s.reference_logps_R)).sort().values
    return smoothed(pairs.options.beta * (policy_P - reference_P), pairs.options.label_smoothing)


def aot_unpaired(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """Sorted log-ratios of the chosen answers against those of the rejected ones."""
    chosen_P, rejected_P = (side(pairs.log_ratio_R).sort().values for side in (pairs.chosen, pairs.rejected))
    return smoothed(pairs.options.beta * (chosen_P - rejected_P), pairs.options.label_smoothing)
