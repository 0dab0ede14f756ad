"""What the tests of invariance measure: the same batch in every case, each number of processes one world."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch import Tensor

from megadpo.config.schema import ObjectiveConfig
from tests.helpers import oracle
from tests.helpers.models import random_groups, save_model
from tests.helpers.worlds import run_world
from tests.parity.worker import Case, Outcome, outcomes


def trained_outcomes(
    directory: Path, changes: dict[str, Any], cases: dict[int, list[Case]], scores: bool = False
) -> tuple[dict[str, Tensor], list[tuple[Case, Outcome]]]:
    """A Qwen3 with `changes` in every case (by number of processes): its weights before, and what each case gave:
    gradients, and weights after three AdamW steps; with `scores` log-probs too."""
    policy = save_model(directory / "policy", "qwen3", **changes)
    reference = save_model(directory / "reference", "qwen3", seed=1, **changes)
    groups, measure = random_groups(13, seed=3), functools.partial(outcomes, scores=scores)
    before = {name: tensor.clone() for name, tensor in oracle.load(policy).named_parameters()}
    found = [
        pair
        for num_processes, some in cases.items()
        for pair in zip(some, run_world(num_processes, measure, policy, reference, groups, some, 3)[0], strict=True)
    ]
    return before, found


def material_of_every_kind(directory: Path, options: list[dict[str, Any]]) -> tuple[Path, Path, dict[str, Any], list[Any]]:
    """Policy, reference, groups by kind, and the objectives that `options` describe: what outcomes_of_objectives takes."""
    policy = save_model(directory / "policy", "llama", num_hidden_layers=2)
    reference = save_model(directory / "reference", "llama", seed=1, num_hidden_layers=2)
    groups = {kind: random_groups(7, seed=5, kind=kind) for kind in ("pairs", "lists", "labels", "examples")}
    groups["numbered"] = random_groups(7, seed=5, numbered=True)
    return policy, reference, groups, [ObjectiveConfig(**{"beta": 0.1, **chosen}) for chosen in options]
