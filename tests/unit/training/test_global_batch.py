"""Between forward and backward: what the objective is given."""

from __future__ import annotations

import pytest
import torch

from megadpo.config.schema import ObjectiveConfig
from megadpo.data.batches.collate import collate_groups
from megadpo.objectives.objective import Objective
from megadpo.objectives.statistics import RESPONSE_SUMS
from megadpo.objectives.terms import Normalisers
from megadpo.training.global_batch import evaluate_micro_batch
from tests.helpers.models import random_groups


def test_a_reference_that_has_not_run_is_no_reference_of_zeros() -> None:
    """As where an interleaved reference is given to the step, but not to the engine's schedule."""
    micro_batch = collate_groups(random_groups(2), [0, 1])
    sums_RS = torch.randn(micro_batch.num_responses, len(RESPONSE_SUMS), dtype=torch.float64)
    with pytest.raises(AssertionError, match="the reference has not run"):
        evaluate_micro_batch(Objective.of(ObjectiveConfig()), Normalisers(2), micro_batch, sums_RS, None)
    simpo = Objective.of(ObjectiveConfig(loss_type="simpo"))
    gradient_RD, _ = evaluate_micro_batch(simpo, Normalisers(2), micro_batch, sums_RS, None)
    assert gradient_RD.any()
