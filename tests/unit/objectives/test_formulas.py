"""What TRL 1.16 does not have, against the papers' formulas written out in plain Python, response by response."""

from __future__ import annotations

import pytest

from megadpo.config.schema import ObjectiveConfig
from megadpo.objectives.specs import kind_of
from megadpo.objectives.terms import Normalisers
from tests.helpers.statistics import evaluate, random_statistics
from tests.unit.objectives.formulas import (
    BETA,
    CASES,
    DELTA,
    KL,
    NEUTRAL,
    READS,
    SIZES,
    Row,
)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "row_weights"])
@pytest.mark.parametrize(("options", "formula"), CASES, ids=[str(options) for options, _ in CASES])
def test_each_loss_is_its_papers_formula(options, formula, weighted):
    import dataclasses

    import torch

    objective = ObjectiveConfig(beta=BETA, row_weights=weighted, **options)
    size = SIZES[kind_of(objective.loss_types)]
    statistics = random_statistics(6, seed=4, size=size, numbers=True)
    unread = {name: torch.full_like(statistics.margin_R, value) for name, value in NEUTRAL.items()}
    unread = {name: values for name, values in unread.items() if not options.get(READS[name])}
    if not weighted:
        unread["row_weight_R"] = torch.ones_like(statistics.margin_R)
    statistics = dataclasses.replace(statistics, **unread)
    found = evaluate(statistics, Normalisers(6, kl=KL, delta=DELTA), objective)
    rows = [Row(statistics, int(first), size) for first in statistics.first_G]
    expected = [(row.weight if weighted else 1.0) * formula(row) for row in rows]
    assert found.losses_U.tolist() == pytest.approx(expected, rel=1e-10)
    assert float(found.loss) == pytest.approx(sum(expected) / 6, rel=1e-10)
