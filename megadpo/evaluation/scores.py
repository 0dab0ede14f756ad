"""What a model says of the two answers of a pair, as a score each: the kinds of score there are.

Axes: P pairs, 2 their answers, the chosen one first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megadpo.config.schema import ObjectiveConfig
from megadpo.objectives.specs import SPECS, has_reward_head, needs_reference

Floats = npt.NDArray[np.float64]

KINDS: Mapping[str, str] = {
    "log_ratio": "beta x (log-prob - the reference's): DPO's implicit reward",
    "mean_log_ratio": "the same a token",
    "log_prob": "beta x log-prob: no reference",
    "mean_log_prob": "the same a token: SimPO's reward",
    "reward": "the scalar head of a reward model",
}
"""Every kind of score, and what it is."""


@dataclass(frozen=True)
class Measured:
    """What was computed of every pair.

    Attributes:
        num_tokens_P2: scored tokens of each answer: all but the first of one without a prompt.
        logps_P2: the model's log-probs; None for a reward model.
        reference_logps_P2: None without a reference.
        rewards_P2: None but for a reward model.
    """

    num_tokens_P2: Floats
    logps_P2: Floats | None = None
    reference_logps_P2: Floats | None = None
    rewards_P2: Floats | None = None


def kinds_there_are(measured: Measured) -> list[str]:
    """The kinds of score that can be had, in the order of KINDS."""
    if measured.rewards_P2 is not None:
        return ["reward"]
    return list(KINDS)[0 if measured.reference_logps_P2 is not None else 2 : 4]


def scores(kind: str, measured: Measured, options: ObjectiveConfig) -> Floats:
    """[P, 2]: the scores of a kind.

    Args:
        options: `beta`, and AlphaPO's alpha, which turns log-probs into rewards where it is not 0: those of the kind that
            the objective has, for which it was chosen. The reward may be infinite.
    """
    if kind == "reward":
        assert measured.rewards_P2 is not None
        return measured.rewards_P2
    assert measured.logps_P2 is not None
    values_P2 = measured.logps_P2
    if kind.endswith("log_ratio"):
        assert measured.reference_logps_P2 is not None
        values_P2 = values_P2 - measured.reference_logps_P2
    if kind.startswith("mean_"):
        values_P2 = values_P2 / np.maximum(measured.num_tokens_P2, 1)
    if options.alphapo_alpha and kind.endswith("log_prob") and kind == kind_of_objective(options):
        with np.errstate(over="ignore"):
            values_P2 = (1 - np.exp(-options.alphapo_alpha * values_P2)) / options.alphapo_alpha
    return np.asarray(options.beta * values_P2)


def kind_of_objective(options: ObjectiveConfig) -> str:
    """The kind that a run with this objective calls its reward."""
    losses = options.loss_types
    if has_reward_head(losses):
        return "reward"
    return "log_ratio" if needs_reference(losses) else SPECS[losses[0]].reward
