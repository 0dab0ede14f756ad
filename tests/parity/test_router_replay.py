"""Router replay: the policy's tokens go to the experts that the reference chose, as in transformers with routers told so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megadpo.config.schema import ObjectiveConfig, PipelineScheduleConfig
from megadpo.parallel.layout import Layout
from tests.helpers import oracle
from tests.helpers.models import hh_groups, random_groups, save_model
from tests.helpers.worlds import run_world
from tests.parity import zero_worker
from tests.parity.worker import Case, outcomes, outcomes_of_objectives

pytestmark = pytest.mark.slow

BETA = 0.1
SPLIT = PipelineScheduleConfig(name="1f1b", split_pairs=True)
CASES = [
    Case(Layout(tensor=2, sequence=True, expert=2), router_replay=True, tokens_per_micro_batch=200),
    Case(Layout(data=2, expert=2), router_replay=True, share_prompts=False, recompute="full"),
    Case(Layout(context=2, context_method="allgather"), router_replay=True, tokens_per_micro_batch=200),
    Case(Layout(pipeline=2), router_replay=True, tokens_per_micro_batch=200, recompute="small", schedule=SPLIT),
]
VIRTUAL = Case(Layout(pipeline=2, virtual=2), router_replay=True, tokens_per_micro_batch=200)
MODELS = {
    "qwen3_moe": {"mlp_only_layers": [0], "norm_topk_prob": True},
    "glm4_moe": {"num_hidden_layers": 4, "first_k_dense_replace": 1},
}


@pytest.fixture(scope="module", params=["qwen3_moe", pytest.param("glm4_moe", marks=pytest.mark.exhaustive)])
def measured(request, tmp_path_factory):
    """A policy whose reference routes otherwise: what transformers says, and what each layout and engine says."""
    directory, family = tmp_path_factory.mktemp(request.param), request.param
    policy = save_model(directory / "policy", family, **MODELS[family])
    reference = save_model(directory / "reference", family, seed=1, **MODELS[family])
    groups = hh_groups(6, policy, max_length=100)
    found = run_world(1, outcomes, policy, reference, groups, [Case(Layout(), router_replay=True)])[0]
    found += run_world(2, outcomes, policy, reference, groups, [*CASES, VIRTUAL])[0]
    cases: list[Any] = [Case(Layout(), router_replay=True), *CASES, VIRTUAL]
    sharded = [zero_worker.Case(Layout(data=2, expert=2), 3, 400, router_replay=True)]
    found += run_world(2, zero_worker.outcomes, policy, reference, groups, sharded, 1)[0]
    return _expected(policy, reference, groups), list(zip(cases + sharded, found, strict=True))


def _expected(policy, reference, groups) -> tuple[float, dict[str, Tensor], float]:
    """Loss, gradients, and the part of the policy's own choices that are the reference's."""
    model = oracle.load(policy)
    taken: list[Tensor] = []
    frozen = oracle.load(reference)
    with _routed(frozen, lambda indices: taken.append(indices) or indices):
        reference_logps = oracle.all_logps(frozen, groups)
    num_equal = num_choices = 0

    def replay(own: Tensor) -> Tensor:
        nonlocal num_equal, num_choices
        replayed = taken.pop(0)
        num_equal += int((own[:, :, None] == replayed[:, None]).sum())
        num_choices += own.numel()
        return replayed

    with _routed(model, replay):
        loss, gradients = oracle.dpo_step(model, groups, reference_logps, BETA)
    assert not taken
    return loss, gradients, num_equal / num_choices


@contextlib.contextmanager
def _routed(model: torch.nn.Module, choose) -> Iterator[None]:
    """Within, transformers' routers send tokens to `choose(their own choice [T, K])`."""
    config = model.config

    def weigh(module: torch.nn.Module, inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> tuple:
        logits, _, own = output
        indices = choose(own)
        scores = logits.softmax(-1) if config.model_type == "qwen3_moe" else logits.sigmoid()
        weights = scores.gather(1, indices)
        weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights * getattr(config, "routed_scaling_factor", 1.0), indices

    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    handles = [router.register_forward_hook(weigh) for router in routers]
    yield
    for handle in handles:
        handle.remove()


def test_loss_and_every_gradient_are_those_of_transformers_with_the_reference_s_routes(measured):
    (loss, gradients, _), found = measured
    for case, outcome in found:
        worst, name = oracle.worst_relative_error(outcome.gradients, gradients)
        assert worst <= 1e-5, f"{case}: {name} {worst}"
        assert outcome.loss == pytest.approx(loss, rel=1e-6), str(case)


def test_the_metrics_say_how_many_of_the_routes_the_policy_would_have_taken_itself(measured):
    (_, _, agreement), found = measured
    assert 0 < agreement < 0.9, "the two models route differently"
    for case, outcome in found:
        assert outcome.router["moe/replay_agreement"] == pytest.approx(agreement, abs=1e-6), str(case)


def test_objectives_that_look_at_the_whole_batch_first_go_by_the_same_routes_in_every_pass(tmp_path):
    changes = {"num_hidden_layers": 2, "mlp_only_layers": []}
    policy = save_model(tmp_path / "policy", "qwen3_moe", tokenizer=False, **changes)
    reference = save_model(tmp_path / "reference", "qwen3_moe", seed=1, tokenizer=False, **changes)
    groups = {kind: random_groups(9, seed=2, kind=kind) for kind in ("pairs", "labels")}
    objectives = [ObjectiveConfig(loss_type=name) for name in ("kto", "aot")]
    alone = run_world(1, outcomes_of_objectives, policy, reference, groups, [Case(Layout(), router_replay=True)], objectives)
    spread = run_world(2, outcomes_of_objectives, policy, reference, groups, CASES[:1], objectives)
    for objective, ours, theirs in zip(objectives, spread[0][0], alone[0][0], strict=True):
        oracle.assert_same_step(objective.loss_type, ours, theirs)
