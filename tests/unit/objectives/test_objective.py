"""An objective is made once from its options; a loss is one function and one line of the table."""

from __future__ import annotations

import pytest
import torch

from megadpo.config.schema import ObjectiveConfig
from megadpo.objectives import pairwise
from megadpo.objectives.coupled import RunningMean
from megadpo.objectives.objective import Objective
from megadpo.objectives.specs import SPECS, Spec
from megadpo.objectives.terms import Normalisers
from megadpo.validation.load import load_config
from tests.helpers.statistics import evaluate, random_statistics


def test_a_new_loss_is_one_function_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairwise, "toy", lambda pairs, normalisers: 2 - pairs.scaled_margin_P, raising=False)
    monkeypatch.setitem(SPECS, "toy", Spec("a test"))
    options = load_config({"objective": {"loss_type": ["toy", "sigmoid"], "loss_weights": [2.0, 1.0]}}).objective
    statistics = random_statistics(3)
    both, alone = (evaluate(statistics, Normalisers(3), o) for o in (options, ObjectiveConfig()))
    margin_P = 0.1 * (statistics.logps_R - statistics.reference_logps_R).view(3, 2) @ torch.tensor([1.0, -1.0]).double()
    torch.testing.assert_close(both.losses_U, 2 * (2 - margin_P) + alone.losses_U)
    assert Objective.of(options).metric_names[-2:] == ("loss/toy", "loss/sigmoid")


@pytest.mark.parametrize(
    ("options", "kind", "true"),
    [
        ({}, "pairs", {"needs_reference"}),
        ({"loss_type": "aot"}, "pairs", {"needs_reference", "couples_batch"}),
        ({"loss_type": "bco_pair", "bco_running_delta": True}, "pairs", {"needs_reference", "couples_batch", "runs_delta"}),
        ({"loss_type": ["kto", "sft"]}, "labels", {"needs_reference", "measures_kl"}),
        ({"loss_type": "bco"}, "labels", {"needs_reference", "couples_batch", "runs_delta"}),
        ({"loss_type": "orpo"}, "pairs", {"scores_prompt"}),
        ({"loss_type": "reward"}, "pairs", {"has_reward_head"}),
        ({"loss_type": "all_pairs"}, "lists", {"needs_reference"}),
        ({"loss_type": "sft"}, "examples", set()),
    ],
    ids=lambda value: str(value.get("loss_type", "sigmoid")) if isinstance(value, dict) else "",
)
def test_what_an_objective_needs(options: dict, kind: str, true: set[str]) -> None:
    objective = Objective.of(ObjectiveConfig(**options))
    assert objective.kind == kind
    assert {name for name, value in vars(objective).items() if value is True} == true
    assert ("kl" in objective.metric_names, "delta" in objective.metric_names) == (
        objective.measures_kl,
        objective.runs_delta,
    )


@pytest.mark.parametrize(
    ("options", "rewards"),
    [
        ({"loss_type": "sigmoid"}, lambda s: 0.5 * (s.logps_R - s.reference_logps_R)),
        ({"loss_type": ["sft", "sigmoid"]}, lambda s: 0.5 * (s.logps_R - s.reference_logps_R)),
        ({"loss_type": "cpo"}, lambda s: 0.5 * s.token_logps_R),
        ({"loss_type": "simpo"}, lambda s: 0.5 * s.token_logps_R / s.num_tokens_R),
        ({"loss_type": "reward"}, lambda s: s.reward_R),
    ],
    ids=lambda value: str(value["loss_type"]) if isinstance(value, dict) else "",
)
def test_the_rewards_of_the_metrics(options: dict, rewards) -> None:
    statistics = random_statistics(4)
    found = evaluate(statistics, Normalisers(4, 100), ObjectiveConfig(beta=0.5, **options))
    torch.testing.assert_close(found.rewards_R, rewards(statistics))


def test_a_running_mean_is_a_value() -> None:
    before = RunningMean(3.0, 2)
    after = before.including(6.0)
    assert (before.mean, after.mean, RunningMean().mean) == (1.5, 3.0, 0.0)
