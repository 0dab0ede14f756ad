"""Where units of the global batch depend on each other: losses that are evaluated on all of its pairs at once, and BCO's
running mean of the rewards."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class RunningMean:
    """BCO's delta: the mean over steps of the global batch's mean reward, the step at hand included.

    As the RunningMoments of TRL's BCOTrainer, which saw one number a step. Part of the checkpoint.
    """

    total: float = 0.0
    count: int = 0

    def including(self, value: float) -> RunningMean:
        """With a step's mean reward taken in."""
        return RunningMean(self.total + value, self.count + 1)

    @property
    def mean(self) -> float:
        """The mean so far; 0 before the first step."""
        return self.total / self.count if self.count else 0.0
