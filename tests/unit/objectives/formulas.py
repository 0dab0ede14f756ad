"""Formulas of the papers in plain Python, response by response."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from megadpo.objectives.statistics import ResponseStatistics

BETA, KL, DELTA = 0.3, 1.7, 0.4


SIZES = {"pairs": 2, "lists": 4, "labels": 1, "examples": 1}


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -30 else x


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


class Row:
    """One group's numbers as plain floats."""

    def __init__(self, s: ResponseStatistics, first: int, size: int) -> None:
        def of(values: Any) -> list[float]:
            return [float(value) for value in values[first : first + size]]

        self.z = of(s.logps_R - s.reference_logps_R)
        self.score, self.margin, self.right = of(s.given_score_R), of(s.margin_R)[0], of(s.label_probability_R)[0]
        self.weight, self.label, self.reward = of(s.row_weight_R)[0], of(s.label_R)[0], of(s.reward_R)
        self.mean = of(s.token_logps_R / s.num_tokens_R)

    @property
    def h(self) -> float:
        return BETA * (self.z[0] - self.z[1])


def plackett_luce(row: Row) -> float:
    scores = [BETA * z for z in row.z]
    return -sum(scores[k] - math.log(sum(math.exp(s) for s in scores[k:])) for k in range(len(scores)))


def best_vs_rest(row: Row) -> float:
    """S-DPO as its paper writes it: -log sigmoid(-log sum exp of the rejected over the chosen)."""
    return -log_sigmoid(-math.log(sum(math.exp(BETA * (z - row.z[0])) for z in row.z[1:])))


def all_pairs(row: Row, weight: Callable[[int, int], float], is_mean: bool) -> float:
    pairs = [(i, j) for i, j in itertools.permutations(range(len(row.z)), 2) if row.score[i] > row.score[j]]
    total = sum(weight(i, j) * -log_sigmoid(BETA * (row.z[i] - row.z[j])) for i, j in pairs)
    return total / sum(weight(i, j) for i, j in pairs) if is_mean else total


def lipo(row: Row) -> float:
    """LiPO-lambda: gains of the given scores, discounts of the policy's own ranking."""
    ranking = sorted(range(len(row.z)), key=lambda i: -row.z[i])
    place = {response: number + 1 for number, response in enumerate(ranking)}

    def weight(i: int, j: int) -> float:
        discounts = abs(1 / math.log(1 + place[i]) - 1 / math.log(1 + place[j]))
        return abs(2 ** row.score[i] - 2 ** row.score[j]) * discounts

    return all_pairs(row, weight, is_mean=False)


def rpo(row: Row) -> tuple[float, float]:
    return sigmoid(0.6 * (row.score[0] - row.score[1])), sigmoid(row.h)


def kl_of(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def soft(row: Row, logit: float) -> float:
    return -row.right * log_sigmoid(logit) - (1 - row.right) * log_sigmoid(-logit)


CASES: list[tuple[dict[str, Any], Callable[[Row], float]]] = [
    ({"loss_type": "plackett_luce"}, plackett_luce),
    ({"loss_type": "best_vs_rest"}, best_vs_rest),
    ({"loss_type": "all_pairs"}, lambda row: all_pairs(row, lambda i, j: 1.0, True)),
    (
        {"loss_type": "all_pairs", "list_weights": "score"},
        lambda row: all_pairs(row, lambda i, j: row.score[i] - row.score[j], True),
    ),
    ({"loss_type": "all_pairs", "list_weights": "lambda"}, lipo),
    ({"loss_type": "rpo_bwd_kl", "rpo_eta": 0.6}, lambda row: kl_of(*rpo(row))),
    ({"loss_type": "rpo_fwd_kl", "rpo_eta": 0.6}, lambda row: kl_of(*reversed(rpo(row)))),
    ({"loss_type": "rpo_sq", "rpo_eta": 0.6}, lambda row: (row.h - 0.6 * (row.score[0] - row.score[1])) ** 2),
    ({"margins": True}, lambda row: -log_sigmoid(row.h - row.margin)),
    ({"loss_type": "hinge", "margins": True}, lambda row: max(0.0, 1 - row.h + row.margin)),
    ({"soft_labels": True}, lambda row: soft(row, row.h)),
    ({"loss_type": "simpo", "soft_labels": True}, lambda row: soft(row, BETA * (row.mean[0] - row.mean[1]) - 0.5)),
    ({"loss_type": "ipo", "ipo_normalization": "sum"}, lambda row: (row.z[0] - row.z[1] - 1 / (2 * BETA)) ** 2),
    (
        {"loss_type": "bco_pair", "bco_running_delta": True},
        lambda row: -log_sigmoid(BETA * row.z[0] - DELTA) - log_sigmoid(DELTA - BETA * row.z[1]),
    ),
    ({"loss_type": "bco"}, lambda row: -log_sigmoid((BETA * row.z[0] - DELTA) * (1 if row.label else -1))),
    (
        {"loss_type": "kto", "desirable_weight": 1.4, "undesirable_weight": 0.6},
        lambda row: (
            1.4 * (1 - sigmoid(BETA * (row.z[0] - KL))) if row.label else 0.6 * (1 - sigmoid(BETA * (KL - row.z[0])))
        ),
    ),
    (
        {"loss_type": "reward", "margins": True, "reward_center_coef": 0.2},
        lambda row: -log_sigmoid(row.reward[0] - row.reward[1] - row.margin) + 0.2 * (row.reward[0] + row.reward[1]) ** 2,
    ),
]


NEUTRAL = {"margin_R": 0.0, "label_probability_R": 1.0}


READS = {"margin_R": "margins", "label_probability_R": "soft_labels"}
