"""Figures of pairs: accuracy with its interval, margins, calibration; a subset, all of them, a length at a time.

Axes: P pairs, 2 their answers, the chosen one first.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from megadpo.evaluation.scores import Floats, Measured

Z95 = 1.959963984540054
"""Standard deviations on each side of a normal mean that hold 95 % of it."""
NUM_BINS = 10
Record = dict[str, Any]


def accuracy_of(margins_P: Floats) -> Record:
    """How many pairs' chosen answer has the higher score, as TRL and RewardBench count: a tie is no win.

    The interval is Wilson's, of 95 % (J. Am. Stat. Assoc. 22, 1927).
    """
    num_pairs, num_right = len(margins_P), int((margins_P > 0).sum())
    low, high = wilson(num_right, num_pairs)
    return {
        "num_pairs": num_pairs,
        "accuracy": num_right / num_pairs if num_pairs else None,
        "accuracy_low": low,
        "accuracy_high": high,
        "num_ties": int((margins_P == 0).sum()),
    }


def wilson(num_right: float, count: int) -> tuple[float | None, float | None]:
    """Bounds of 95 % for the probability of what was seen `num_right` times of `count`; None of nothing."""
    if not count:
        return None, None
    share, spread = num_right / count, Z95**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(share * (1 - share) / count + spread / count / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def record_of(scores_P2: Floats, measured: Measured, places_P: npt.NDArray[np.bool_]) -> Record:
    """Accuracy, margin and what goes with them of those pairs at which `places_P` is true."""
    chosen_P, rejected_P = scores_P2[places_P].T
    margins_P, tokens_P2 = chosen_P - rejected_P, measured.num_tokens_P2[places_P]
    record = accuracy_of(margins_P) | {
        "margin": _mean(margins_P),
        "margin_error": _standard_error(margins_P),
        "chosen_score": _mean(chosen_P),
        "rejected_score": _mean(rejected_P),
        "chosen_tokens": _mean(tokens_P2[:, 0]),
        "rejected_tokens": _mean(tokens_P2[:, 1]),
    }
    if measured.logps_P2 is not None:
        record |= {f"{side}_logp": value for side, value in _sides(measured.logps_P2[places_P]).items()}
    if measured.logps_P2 is not None and measured.reference_logps_P2 is not None:
        ratios_P2 = measured.logps_P2[places_P] - measured.reference_logps_P2[places_P]
        record |= {f"{side}_log_ratio": value for side, value in _sides(ratios_P2).items()}
        record |= {f"{side}_win_rate": value for side, value in _sides((ratios_P2 > 0).astype(np.float64)).items()}
    return record


def _sides(values_P2: Floats) -> dict[str, float | None]:
    return {"chosen": _mean(values_P2[:, 0]), "rejected": _mean(values_P2[:, 1])}


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if len(values) else None


def _standard_error(values: Floats) -> float | None:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def calibration_of(margins_P: Floats, num_bins: int = NUM_BINS) -> tuple[list[Record], float]:
    """The calibration curve of a preference model, and its expected calibration error (arXiv:1706.04599, eq. 3).

    sigmoid(|margin|), from 0.5 to 1, is the probability that the model gives the answer that it finds the better one; it is
    right where that is the chosen one. A tie is right by half, as its probability says.

    Returns:
        A record for each bin of equal width that has pairs; the mean over pairs of |accuracy - prediction| there. Pairs
        whose margin is NaN are left out; NaN of none.
    """
    margins_P = margins_P[~np.isnan(margins_P)]
    if not len(margins_P):
        return [], math.nan
    predicted_P = 1 / (1 + np.exp(-np.abs(margins_P)))
    right_P = np.where(margins_P == 0, 0.5, (margins_P > 0).astype(np.float64))
    bin_P = np.minimum(((predicted_P - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    records, error = [], 0.0
    for number in range(num_bins):
        places_P = bin_P == number
        count = int(places_P.sum())
        if not count:
            continue
        predicted, accuracy = float(predicted_P[places_P].mean()), float(right_P[places_P].mean())
        low, high = wilson(accuracy * count, count)
        edges: Record = {"low": 0.5 + number / num_bins / 2, "high": 0.5 + (number + 1) / num_bins / 2, "num_pairs": count}
        records.append(edges | {"predicted": predicted, "accuracy": accuracy, "accuracy_low": low, "accuracy_high": high})
        error += count / len(margins_P) * abs(accuracy - predicted)
    return records, error


def by_length(margins_P: Floats, measured: Measured) -> list[Record]:
    """The accuracy where the chosen answer is the longer one in tokens, the shorter one, and neither."""
    longer_P = np.sign(measured.num_tokens_P2[:, 0] - measured.num_tokens_P2[:, 1])
    names = {"chosen is longer": 1, "chosen is shorter": -1, "equally long": 0}
    return [{"name": name} | accuracy_of(margins_P[longer_P == sign]) for name, sign in names.items()]


def kl_of(log_ratios_S: Floats, num_tokens_S: Floats) -> Record:
    """The KL divergence of the policy from the reference, in nats an answer, estimated from S answers of the policy.

    `estimate` is the plain mean of log p - log p_reference, `estimate_k3` that of the same minus 1 plus exp of its negative
    (J. Schulman, "Approximating KL divergence", 2020), which is never negative: both are right on average where the
    answers are drawn from the policy itself.
    """
    inverse_S = np.exp(np.minimum(-log_ratios_S, 700.0))
    return {
        "num_answers": len(log_ratios_S),
        "estimate": _mean(log_ratios_S),
        "standard_error": _standard_error(log_ratios_S),
        "estimate_k3": _mean(log_ratios_S - 1 + inverse_S),
        "per_token": float(log_ratios_S.sum() / max(num_tokens_S.sum(), 1)),
    }
