"""Formulas in plain Python as a source to compare with: their values, and their numeric derivatives in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megadpo.config.schema import ObjectiveConfig
from megadpo.objectives.specs import kind_of
from megadpo.objectives.statistics import DIFFERENTIABLE, ResponseStatistics
from megadpo.objectives.terms import Normalisers
from tests.helpers.statistics import evaluate, random_statistics
from tests.unit.objectives.formulas import BETA, CASES, DELTA, KL, NEUTRAL, READS, SIZES, Row
from tests.unit.objectives.trl_code import Measured

NUM_GROUPS, STEP = 6, 1e-2
SEED = 38
"""No two responses of a list are so near to each other that a step would change their order."""

Formula = Callable[[Row], float]
FORMULAS: list[tuple[dict[str, Any], Formula]] = [
    *CASES,
    (
        {"loss_type": "custom", "module": "examples/custom_objective.py:squared_hinge"},
        lambda row: max(0.0, 1 - row.h) ** 2,
    ),
]


def against_formula(options: dict[str, Any], formula: Formula) -> Measured:
    """Our loss and gradient against the mean of `formula` over groups and that mean's numeric derivative."""
    objective = ObjectiveConfig(beta=BETA, **options)
    size = SIZES[kind_of(objective.loss_types)]
    s = random_statistics(NUM_GROUPS, seed=SEED, size=size, numbers=True)
    unread = {name: torch.full_like(s.margin_R, value) for name, value in NEUTRAL.items() if not options.get(READS[name])}
    s = replace(s, row_weight_R=torch.ones_like(s.margin_R), **unread)
    found = evaluate(s, Normalisers(NUM_GROUPS, kl=KL, delta=DELTA), objective)

    def mean(statistics: ResponseStatistics) -> float:
        return sum(formula(Row(statistics, int(first), size)) for first in s.first_G) / NUM_GROUPS

    expected_RD = torch.stack([_derivative(mean, s, name) for name in DIFFERENTIABLE], dim=-1)
    error = (found.gradient_RD - expected_RD).norm() / expected_RD.norm()
    return Measured(abs(float(found.loss) / mean(s) - 1), float(error), float(expected_RD.norm()))


def _derivative(function: Callable[[ResponseStatistics], float], s: ResponseStatistics, name: str) -> Tensor:
    """d function / d statistic of every response: central differences of sixth order."""
    values_R = getattr(s, name)
    gradient_R = torch.zeros_like(values_R)
    for i in range(len(values_R)):
        for steps, weight in ((1, 45), (2, -9), (3, 1)):
            for sign in (1, -1):
                moved_R = values_R.index_add(0, torch.tensor([i]), torch.tensor([sign * steps * STEP], dtype=values_R.dtype))
                gradient_R[i] += sign * weight * function(replace(s, **{name: moved_R})) / (60 * STEP)
    return gradient_R
