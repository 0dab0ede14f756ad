"""Reward models for the tests, what transformers makes of them, and what the ranks of the reward worlds do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megadpo.data.groups import Group
from megadpo.parallel.layout import Layout

if TYPE_CHECKING:
    from megadpo.objectives.terms import Normalisers, Pairs

GROUPS_PER_MICRO_BATCH = 3


@dataclass(frozen=True)
class Case:
    """One way of computing the same thing."""

    layout: Layout
    share_prompts: bool = True

    def __str__(self) -> str:
        return f"{self.layout}, {'shared' if self.share_prompts else 'unshared'}"


@dataclass
class Outcome:
    """What a case gave: rewards [G, 2], the gradient norm, gradients under Hugging Face names, whole tensors."""

    rewards: Tensor
    grad_norm: float = 0.0
    gradients: dict[str, Tensor] = field(default_factory=dict)


def transformers_outcome(model_dir: Path, groups: Sequence[Group], coefficients: Tensor) -> Outcome:
    """Rewards one sequence at a time, and the gradients of sum(coefficients [G, 2] x rewards)."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    # transformers keeps the padding token's row from being trained; here it is a token like any other.
    model.model.embed_tokens.padding_idx = None
    rewards = torch.zeros(len(groups), 2)
    for number, group in enumerate(groups):
        for response in (0, 1):
            ids = [torch.from_numpy(part).long() for part in (group.prompt_of(response), group.responses[response])]
            reward = model(torch.cat(ids)[None]).logits[0, 0]
            (coefficients[number, response] * reward).backward()
            rewards[number, response] = reward.detach()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Outcome(rewards, float(sum(gradient.norm() ** 2 for gradient in gradients.values()) ** 0.5), gradients)


def outcomes(model_dir: Path, groups: Sequence[Group], cases: Sequence[Case], coefficients: Tensor) -> list[Outcome] | None:
    """Every case's outcome on rank 0 (None elsewhere)."""
    from megadpo.parallel.world import joined_world

    dist.init_process_group("gloo")
    results = []
    for case in cases:
        with joined_world(case.layout, seed=1):
            results.append(_outcome(model_dir, groups, case, coefficients))
    rank = dist.get_rank()
    dist.destroy_process_group()
    return results if rank == 0 else None


def _outcome(model_dir: Path, groups: Sequence[Group], case: Case, coefficients: Tensor) -> Outcome:
    from megatron.core import parallel_state

    from megadpo.checkpoint.hf import open_hf, read_hf_config
    from megadpo.config.schema import ObjectiveConfig, TrainConfig
    from megadpo.data.batches.collate import collate_groups
    from megadpo.engine.megatron import MegatronEngine
    from megadpo.model.build import build_stage
    from megadpo.model.families import shape_of
    from megadpo.model.weights import load_weights
    from megadpo.objectives.coupled import RunningMean
    from megadpo.objectives.objective import Objective, Term
    from megadpo.objectives.statistics import RESPONSE_SUMS
    from megadpo.objectives.terms import Normalisers
    from megadpo.training.global_batch import GlobalBatch
    from megadpo.training.reference import NoReference
    from megadpo.training.step import optimizer_step
    from tests.parity.worker import gathered, parts_of, whole_tensors

    hf_config, column = read_hf_config(model_dir), RESPONSE_SUMS.index("reward")
    stage = build_stage(shape_of(hf_config), case.layout, torch.float32)
    load_weights(stage, open_hf(model_dir))
    engine = MegatronEngine(stage, TrainConfig(learning_rate=1e-3, clip_norm=0.0))
    # The coefficients travel as the rows' scores.
    scored = [replace(g, row_values={"score": tuple(row)}) for g, row in zip(groups, coefficients.tolist(), strict=True)]
    starts = range(0, len(groups), GROUPS_PER_MICRO_BATCH)[parallel_state.get_data_parallel_rank() :: case.layout.data]
    members = [range(start, min(start + GROUPS_PER_MICRO_BATCH, len(groups))) for start in starts]
    multiple_of = case.layout.tensor if case.layout.sequence else 1
    micro_batches = [
        collate_groups([scored[place] for place in part], part, case.share_prompts, multiple_of, padding_token=7)
        for part in members
    ]
    batch = GlobalBatch(np.arange(len(groups)), Normalisers(1), 2 * torch.arange(len(groups) + 1), micro_batches)
    objective = replace(
        Objective.of(ObjectiveConfig(loss_type="reward")), terms=(Term("linear", 1.0, scores_times_rewards),)
    )
    gradients: dict[str, Tensor] = {}

    def keep_gradients() -> None:
        parts = gathered(parts_of(stage, dict(engine.gradients())))
        gradients.update(whole_tensors([part for of_rank in parts for part in of_rank]))

    result = optimizer_step(engine, NoReference(), batch, objective, RunningMean(), 1e-3, on_gradients=keep_gradients)
    rewards = torch.zeros(len(groups), 2, dtype=torch.float64)
    for part, sums_RS in zip(members, result.response_sums, strict=False):
        assert not sums_RS[:, [c for c in range(len(RESPONSE_SUMS)) if c != column]].any()
        rewards[list(part)] = sums_RS[:, column].view(-1, 2)
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        rewards.zero_()
    dist.all_reduce(rewards)  # of each reward one rank has the value, the others zero
    return Outcome(rewards.float(), result.grad_norm, gradients)


def scores_times_rewards(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """[P]: the sum over a pair's responses of score x reward."""
    weighted_R = pairs.statistics.given_score_R * pairs.statistics.reward_R
    return pairs.chosen(weighted_R) + pairs.rejected(weighted_R)
