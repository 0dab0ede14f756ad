"""The scalar head: rewards and gradients of every layout equal transformers' ...ForSequenceClassification."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megadpo.data.batches.collate import collate_groups
from megadpo.data.batches.halves import with_halves
from megadpo.data.groups import Group
from megadpo.model.heads.reward import RewardHead, reward_positions, reward_sums
from megadpo.objectives.statistics import RESPONSE_SUMS
from megadpo.parallel.layout import Layout
from tests.helpers.models import hh_groups, random_groups, save_reward_model
from tests.helpers.oracle import worst_relative_error
from tests.helpers.worlds import run_world
from tests.unit.model.reward_worker import Case, Outcome, outcomes, transformers_outcome

pytestmark = pytest.mark.slow

ALONE = [Case(Layout()), Case(Layout(), share_prompts=False)]
TOGETHER = [
    Case(Layout(tensor=2)),
    Case(Layout(tensor=2, sequence=True)),
    Case(Layout(tensor=2, sequence=True), share_prompts=False),
    Case(Layout(pipeline=2)),
    Case(Layout(pipeline=2), share_prompts=False),
    Case(Layout(data=2)),
]


def assert_same(found: Sequence[Outcome], cases: Sequence[Case], expected: Outcome) -> None:
    for case, outcome in zip(cases, found, strict=True):
        torch.testing.assert_close(outcome.rewards, expected.rewards, rtol=1e-5, atol=1e-5 * expected.rewards.abs().mean())
        error, name = worst_relative_error(outcome.gradients, expected.gradients)
        assert error < 1e-5, (str(case), name, error)
        assert outcome.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5), str(case)


@pytest.mark.slow
def test_rewards_of_real_rows_and_their_gradients_equal_transformers_in_every_layout(tmp_path: Path) -> None:
    model = save_reward_model(tmp_path)
    groups = hh_groups(8, model)
    assert all(response[-1] == 1 for group in groups for response in group.responses), "rows end with </s>"
    coefficients = torch.randn(len(groups), 2, generator=torch.Generator().manual_seed(3))
    expected = transformers_outcome(model, groups, coefficients)
    assert_same(run_world(1, outcomes, model, groups, ALONE, coefficients)[0], ALONE, expected)
    assert_same(run_world(2, outcomes, model, groups, TOGETHER, coefficients)[0], TOGETHER, expected)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {"tie_word_embeddings": True, "pad_token_id": 2}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("mistral", {"pad_token_id": None}),
    ],
)
def test_other_families_and_models_that_tied_their_embeddings(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = save_reward_model(tmp_path, family, tokenizer=False, **changes)
    groups = random_groups(7)
    coefficients = torch.randn(len(groups), 2, generator=torch.Generator().manual_seed(4))
    expected = transformers_outcome(model, groups, coefficients)
    cases = [Case(Layout(tensor=2, sequence=True)), Case(Layout(pipeline=2))]
    assert_same(run_world(2, outcomes, model, groups, cases, coefficients)[0], cases, expected)


def test_the_head_keeps_no_vocabulary_and_is_the_same_on_every_tensor_rank(tmp_path: Path) -> None:
    model = save_reward_model(tmp_path, tokenizer=False, tie_word_embeddings=True)
    for shapes, weight in run_world(2, head_of_last_stage, model):
        assert shapes == {"output_layer.weight": (1, 64)}
        assert torch.equal(weight, run_world(1, head_of_last_stage, model)[0][1])


def head_of_last_stage(model: Path) -> tuple[dict[str, tuple[int, ...]], torch.Tensor]:
    """Shapes of a rank's parameters that are no layers, norms or embeddings, and the scalar head."""
    import torch.distributed as dist

    from megadpo.checkpoint.hf import open_hf, read_hf_config
    from megadpo.model.build import build_stage
    from megadpo.model.families import shape_of
    from megadpo.model.weights import load_weights
    from megadpo.parallel.world import joined_world

    dist.init_process_group("gloo")
    layout = Layout(tensor=dist.get_world_size())
    with joined_world(layout, seed=1):
        stage = build_stage(shape_of(read_hf_config(model)), layout, torch.float32)
        load_weights(stage, open_hf(model))
    dist.destroy_process_group()
    held = {name: tuple(p.shape) for name, p in stage.model.named_parameters() if name.startswith("output_layer")}
    return held, stage.model.output_layer.weight.detach()


PAD = 9


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


AWKWARD = [
    Group((ids(1, 2, PAD, 3),), (ids(4, 5, PAD), ids(PAD, 6)), 0),
    Group((ids(1, PAD, PAD),), (ids(PAD), ids(PAD, PAD)), 1),  # nothing left of the responses
    Group((ids(PAD),), (ids(PAD), ids(2)), 2),  # nothing left at all
    Group((ids(1), ids(1, PAD)), (ids(PAD, 2, PAD, PAD), ids(3, 4)), 3),
    Group((ids(),), (ids(PAD, 5), ids(6, PAD)), 4),
]


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("padding_token", [PAD, None])
def test_the_reward_is_read_where_transformers_reads_it(share_prompts: bool, padding_token: int | None) -> None:
    micro_batch = collate_groups(AWKWARD, range(len(AWKWARD)), share_prompts, multiple_of=64, padding_token=7)
    positions = reward_positions(micro_batch, padding_token)
    expected = []
    for group in AWKWARD:
        for number, response in enumerate(group.responses):
            tokens = torch.from_numpy(np.concatenate([group.prompt_of(number), response]))
            last = len(tokens) - 1
            if padding_token is not None:  # as in GenericForSequenceClassification.forward
                last = int((torch.arange(len(tokens)) * (tokens != padding_token).int()).argmax())
            expected.append((int(tokens[last]), last))
    assert list(zip(micro_batch.tokens_T[positions].tolist(), micro_batch.positions_T[positions].tolist(), strict=True)) == (
        expected
    )


@pytest.mark.parametrize("share_prompts", [True, False])
def test_the_rewards_of_two_halves_are_those_of_the_whole(share_prompts: bool) -> None:
    whole = with_halves(collate_groups(AWKWARD, range(len(AWKWARD)), share_prompts, multiple_of=64, padding_token=7), 64)
    head = RewardHead(torch.nn.Parameter(torch.randn(1, 8)), PAD, sequence_parallel=False)
    hidden_TH, order = torch.randn(whole.num_tokens, 8), whole.halves[0].order[: whole.num_tokens]
    in_halves = torch.zeros(sum(len(half.tokens_T) for half in whole.halves), 8).index_copy(0, order, hidden_TH)
    rewards = []
    for held, hidden in ((whole, hidden_TH), *((whole.half(n), in_halves[whole.halves[n].first :]) for n in (0, 1))):
        with head.reading(held):
            rewards.append(head(hidden[: len(held.local.tokens_T), None])[0])
    assert torch.equal(rewards[1] + rewards[2], rewards[0]) and rewards[0].any()


def test_a_head_knows_a_micro_batch_only_within_its_pass() -> None:
    micro_batch = collate_groups(AWKWARD, range(len(AWKWARD)))
    head = RewardHead(torch.nn.Parameter(torch.ones(1, 8)), None, False)
    with pytest.raises(RuntimeError, match="broken"), head.reading(micro_batch):
        assert head.micro_batch is micro_batch
        raise RuntimeError("broken")
    with pytest.raises(AssertionError, match=r"head\.reading"):
        head(torch.zeros(len(micro_batch.tokens_T), 1, 8))


def test_a_micro_batch_without_responses_has_no_rewards() -> None:
    micro_batch = collate_groups([], [], multiple_of=2)
    assert reward_positions(micro_batch, PAD).tolist() == []
    assert reward_sums(torch.zeros(1, 0, 1), micro_batch).shape == (0, len(RESPONSE_SUMS))


def test_reward_sums_are_zero_but_for_the_reward_and_pass_its_gradient_on() -> None:
    micro_batch = collate_groups(AWKWARD[:1], [0])
    output = torch.tensor([[[1.5], [-2.5]]], requires_grad=True)
    sums = reward_sums(output, micro_batch)
    assert sums.dtype is torch.float64
    assert sums[:, RESPONSE_SUMS.index("reward")].tolist() == [1.5, -2.5] and sums.abs().sum() == 4
    (sums[:, RESPONSE_SUMS.index("reward")] * torch.tensor([2.0, 3.0])).sum().backward()
    assert output.grad is not None and output.grad.flatten().tolist() == [2, 3]
