"""Mixtures of experts compute what plain transformers computes, in every layout: log-probs, loss, gradients, updates."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig

from megadpo.config.schema import ModelConfig, ObjectiveConfig, PipelineScheduleConfig
from megadpo.model.activations import Activations
from megadpo.parallel.layout import Layout
from tests.helpers import oracle
from tests.helpers.families import LLAMA3
from tests.helpers.models import hh_groups, random_groups, save_model
from tests.helpers.worlds import run_world
from tests.parity.worker import Case, Outcome, outcomes, outcomes_of_objectives

LOOP, KERNEL = ModelConfig(expert_products="loop"), ModelConfig(expert_products="grouped_mm")
"""Ways to multiply experts beside that of all other cases."""
ONE = {1: [Case(Layout()), Case(Layout(), share_prompts=False, model=LOOP)]}
TWO = {
    2: [
        Case(Layout(data=2)),
        Case(Layout(pipeline=2), recompute="full", tokens_per_micro_batch=200),
        Case(Layout(data=2, expert=2), share_prompts=False),
        Case(Layout(tensor=2, sequence=True, expert_tensor=2), model=LOOP, fusion=True),
        Case(Layout(tensor=2, sequence=True, expert=2), fusion=True),
        Case(Layout(tensor=2, sequence=True), model=KERNEL),
        Case(Layout(context=2, context_method="ulysses", expert=2), tokens_per_micro_batch=200),
        Case(Layout(context=2, context_method="allgather"), share_prompts=False, recompute="full"),
    ]
}
FOUR = {
    4: [
        Case(Layout(pipeline=2, data=2, expert=2)),
        Case(Layout(pipeline=2, data=2, expert=2, chunk_layers=(1, 3))),
        Case(Layout(tensor=2, data=2, sequence=True, expert=2, expert_tensor=2)),
        Case(Layout(tensor=2, data=2, sequence=True, expert=4), tokens_per_micro_batch=200),
        Case(Layout(tensor=2, pipeline=2, sequence=True, expert=2)),
        Case(Layout(data=4, expert=2), share_prompts=False),
        Case(Layout(context=2, context_method="allgather", data=2, expert=4), tokens_per_micro_batch=200),
        Case(Layout(tensor=2, sequence=True, context=2, context_method="allgather", expert=2, expert_tensor=2)),
        Case(Layout(context=2, context_method="ulysses", pipeline=2, expert=2), recompute="small"),
        Case(Layout(pipeline=2, virtual=2, data=2, expert=2), tokens_per_micro_batch=200),
        Case(Layout(tensor=2, sequence=True, pipeline=2, virtual=2, expert=2), recompute="full"),
    ]
}
ONE_BY_ONE = {
    size: [dataclasses.replace(case, model=ModelConfig()) for case in cases] for size, cases in (ONE | TWO).items()
}
"""Whose experts have biases are not multiplied together."""
MODELS = {
    "mixtral": ({"sliding_window": 64, "num_hidden_layers": 2}, ONE | {2: [TWO[2][n] for n in (2, 3, 5, 7)]}),
    "mixtral-more": ({"sliding_window": 64, "num_hidden_layers": 2}, ONE | TWO),
    "qwen3_moe": ({"mlp_only_layers": [0], "norm_topk_prob": True}, {1: ONE[1][:1], 4: FOUR[4][3::6]}),
    "qwen3_moe-more": ({"mlp_only_layers": [0], "norm_topk_prob": True}, ONE | TWO | FOUR),
    "gpt_oss": ({"num_hidden_layers": 2}, {1: ONE_BY_ONE[1][:1], 2: ONE_BY_ONE[2][1::3]}),
    "gpt_oss-more": ({"num_hidden_layers": 2}, ONE_BY_ONE),
    # The first stage has no experts, the second one expert a token, whose probability is not scaled to 1.
    "qwen3_moe-half-dense": (
        {"mlp_only_layers": [0, 1], "num_experts_per_tok": 1, "norm_topk_prob": False, "tie_word_embeddings": True},
        {1: ONE[1][:1], 2: [Case(Layout(pipeline=2)), Case(Layout(data=2, expert=2))]},
    ),
}
GLM: dict[str, Any] = {"num_hidden_layers": 3, "first_k_dense_replace": 1, "use_qk_norm": True, "attention_bias": True}
SHARED = {
    1: ONE[1][1:],
    2: [
        Case(Layout(tensor=2, sequence=True, expert=2), fusion=True),
        Case(Layout(pipeline=2), recompute="full", tokens_per_micro_batch=200),
        Case(Layout(context=2, context_method="ulysses", expert=2), tokens_per_micro_batch=200),
    ],
}
"""Of models with shared experts: one case of each kind of layout."""
MODELS |= {
    "glm4_moe": (GLM, SHARED),
    "glm4_moe-one-group": ({"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "tie_word_embeddings": True}, ONE | TWO),
    "glm4_moe-more": (GLM | {"num_hidden_layers": 4}, ONE | TWO | FOUR),
    "qwen2_moe": ({"num_hidden_layers": 2, "mlp_only_layers": [0]}, SHARED),
    "qwen2_moe-more": ({"qkv_bias": False, "decoder_sparse_step": 2, "norm_topk_prob": True}, ONE | TWO),
}
DEEPSEEK: dict[str, Any] = {"num_hidden_layers": 2, "first_k_dense_replace": 1}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.9,
    "mscale_all_dim": 0.707,
}
MODELS |= {
    "deepseek_v3": (DEEPSEEK, {1: SHARED[1], 2: SHARED[2][:1]}),
    "deepseek_v2": ({**DEEPSEEK, "rope_parameters": YARN}, SHARED),
    "deepseek_v3-more": ({"rope_parameters": YARN, "norm_topk_prob": False, "tie_word_embeddings": True}, ONE | TWO | FOUR),
    "deepseek_v2-greedy": ({**DEEPSEEK, "topk_method": "greedy", "n_group": None, "q_lora_rank": 32}, SHARED),
}
LLAMA4: dict[str, Any] = {"num_hidden_layers": 3, "rope_parameters": LLAMA3, "attention_bias": True}
PLAIN = {"use_qk_norm": False, "attn_temperature_tuning": False, "num_experts_per_tok": 1, "tie_word_embeddings": True}
MODELS |= {
    "llama4_text": (LLAMA4, {1: SHARED[1], 2: SHARED[2][:1]}),
    "llama4_text-plain": ({**PLAIN, "moe_layers": [2, 3], "attention_chunk_size": 2048}, SHARED),
    "llama4_text-more": ({"rope_parameters": LLAMA3}, ONE | TWO | FOUR),
}
RECURRENT = {
    1: ONE[1],
    2: [
        Case(Layout(tensor=2, sequence=True, expert=2), fusion=True),
        Case(Layout(pipeline=2), share_prompts=False, recompute="full", tokens_per_micro_batch=200),
        Case(Layout(pipeline=2), recompute="small", tokens_per_micro_batch=200),
        Case(Layout(pipeline=2), schedule=PipelineScheduleConfig(name="1f1b", zero_bubble=True), tokens_per_micro_batch=200),
        Case(Layout(data=2, expert=2), recompute="selective", tokens_per_micro_batch=200),
        Case(Layout(data=2), memory=Activations(offload="disk", offload_dir=Path(tempfile.gettempdir()))),
    ],
    4: [
        Case(Layout(tensor=2, pipeline=2, sequence=True, expert=2)),
        Case(Layout(pipeline=2, virtual=2, data=2, expert=2), tokens_per_micro_batch=200),
        Case(Layout(tensor=2, sequence=True, pipeline=2, virtual=2), share_prompts=False, recompute="full"),
    ],
}
"""Of models whose layers have a state that goes from token to token, and no context parallelism."""
MODELS |= {
    "qwen3_next": ({"num_hidden_layers": 2}, {1: ONE[1][:1], 2: RECURRENT[2][:1]}),
    "qwen3_next-more": ({"mlp_only_layers": [1], "attention_bias": True, "tie_word_embeddings": True}, RECURRENT),
    "qwen3_next-dense": (
        {"num_hidden_layers": 2, "mlp_only_layers": [0, 1]},
        {1: ONE[1][:1], 2: [Case(Layout(tensor=2)), Case(Layout(tensor=2, sequence=True), share_prompts=False)]},
    ),
}
DEFAULT = ("mixtral", "qwen3_moe", "gpt_oss", "qwen3_moe-half-dense", "glm4_moe", "deepseek_v3", "llama4_text", "qwen3_next")
BETA = 0.1


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in DEFAULT else pytest.mark.exhaustive) for name in MODELS],
)
def measured(request, tmp_path_factory):
    """A policy, a reference and real pairs: what transformers says, and what every case says."""
    directory = tmp_path_factory.mktemp(request.param)
    family, (changes, some_cases) = request.param.split("-")[0], MODELS[request.param]
    policy = save_model(directory / "policy", family, **changes)
    reference = save_model(directory / "reference", family, seed=1, **changes)
    groups = hh_groups(6, policy, max_length=100)
    model = oracle.load(policy)
    reference_logps = oracle.all_logps(oracle.load(reference), groups)
    loss, gradients = oracle.dpo_step(model, groups, reference_logps, BETA)
    expected = oracle.all_logps(model, groups), loss, gradients
    return expected, found_in(some_cases, policy, reference, groups, 0)


def found_in(some_cases, policy, reference, groups, num_steps) -> list[tuple[Case, Outcome]]:
    cases, found = [case for cases in some_cases.values() for case in cases], []
    for size, some in some_cases.items():
        measure = functools.partial(outcomes, objective=ObjectiveConfig(beta=BETA), scores=num_steps == 0)
        found += run_world(size, measure, policy, reference, groups, some, num_steps)[0]
    return list(zip(cases, found, strict=True))


@pytest.mark.slow
def test_response_log_probs_equal_transformers(measured):
    (logps, _, _), found = measured
    for case, outcome in found:
        worst = float((outcome.logps.view_as(logps) - logps).abs().max())
        assert worst <= 1e-4, f"{case}: {worst}"


@pytest.mark.slow
def test_loss_and_every_gradient_equal_transformers_routers_and_experts_included(measured):
    (_, loss, gradients), found = measured
    norm = float(torch.stack([g.double().norm() for g in gradients.values()]).norm())
    for case, outcome in found:
        worst, name = oracle.worst_relative_error(outcome.gradients, gradients)
        assert worst <= 1e-5, f"{case}: {name} {worst}"
        assert outcome.grad_norm == pytest.approx(norm, rel=1e-5), str(case)
        assert outcome.loss == pytest.approx(loss, rel=1e-6), str(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [
        {1: ONE[1][:1], 2: TWO[2][::2], 4: FOUR[4][::8]},
        pytest.param(ONE | TWO | FOUR, marks=pytest.mark.exhaustive),
    ],
    ids=["some layouts", "all layouts"],
)
def test_weights_after_three_steps_and_router_metrics_do_not_depend_on_the_layout(tmp_path, cases):
    # Few tokens: of many, some sooner or later have two experts tied to the last digits, and then rounding chooses.
    policy = save_model(tmp_path / "policy", "mixtral", tokenizer=False)
    reference = save_model(tmp_path / "reference", "mixtral", seed=1, tokenizer=False)
    found = found_in(cases, policy, reference, random_groups(7, seed=3), 3)
    before = oracle.in_files(dict(oracle.load(policy).named_parameters()), MixtralConfig())
    base = found[0][1]
    size = _distance(base.weights, before)
    assert size > 0.1
    for case, outcome in found[1:]:
        assert _distance(outcome.weights, base.weights) <= 1e-4 * size, str(case)
        worst, name = oracle.worst_relative_error(outcome.gradients, base.gradients)
        assert worst <= 1e-5, f"{case}: {name} {worst}"
        assert outcome.grad_norm == pytest.approx(base.grad_norm, rel=1e-5), str(case)
        assert outcome.router == pytest.approx(base.router, rel=1e-6), str(case)


def _distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(torch.stack([(a[name].detach().double() - b[name].detach().double()).norm() for name in a]).norm())


COEFFICIENT = 0.3
BALANCED = {
    1: [
        Case(Layout(), router_aux_coef=COEFFICIENT),
        Case(Layout(), router_aux_coef=COEFFICIENT, share_prompts=False, tokens_per_micro_batch=90, recompute="full"),
    ],
    2: [
        Case(Layout(data=2, expert=2), router_aux_coef=COEFFICIENT, tokens_per_micro_batch=90),
        Case(Layout(tensor=2, sequence=True, expert=2), router_aux_coef=COEFFICIENT),
        Case(Layout(pipeline=2), router_aux_coef=COEFFICIENT, tokens_per_micro_batch=90, recompute="full"),
        Case(Layout(context=2, context_method="allgather", expert=2), router_aux_coef=COEFFICIENT),
        Case(Layout(pipeline=2, virtual=2), router_aux_coef=COEFFICIENT, tokens_per_micro_batch=90),
    ],
}


BALANCED_OFTEN = {1: BALANCED[1][1:], 2: [BALANCED[2][n] for n in (0, 1, 3, 4)]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases", [BALANCED_OFTEN, pytest.param(BALANCED, marks=pytest.mark.exhaustive)], ids=["often", "all"]
)
def test_the_load_balancing_loss_of_the_global_batch_has_the_formula_s_gradient_in_every_layout(tmp_path, cases):
    changes = {"mlp_only_layers": [2], "norm_topk_prob": True}
    policy = save_model(tmp_path / "policy", "qwen3_moe", tokenizer=False, **changes)
    groups = random_groups(7, seed=3)
    found = found_in(cases, policy, policy, groups, 1)
    model = oracle.load(policy)
    _, gradients = oracle.dpo_step(model, groups, oracle.all_logps(model, groups), BETA)
    model.zero_grad()
    loss, loads = _balance(model, groups)
    (COEFFICIENT * loss).backward()
    balance = oracle.in_files(
        {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, model.config
    )
    assert max(float(gradient.norm()) for gradient in balance.values()) > 1e-2
    gradients = {name: gradient + balance.get(name, 0.0) for name, gradient in gradients.items()}
    for case, outcome in found:
        worst, name = oracle.worst_relative_error(outcome.gradients, gradients)
        assert worst <= 1e-5, f"{case}: {name} {worst}"
        assert outcome.loss == pytest.approx(0.6931471805599453, abs=1e-6), "the loss that is reported is the objective's"
        expected = {
            "moe/aux_loss": float(loss.detach()) / len(loads),
            "moe/largest_load": float(loads.max()),
            "moe/mean_largest_load": float(loads.amax(1).mean()),
        }
        assert outcome.router == pytest.approx(expected, rel=1e-5), str(case)


def _balance(model: torch.nn.Module, groups: list) -> tuple[Tensor, Tensor]:
    """E sum_e share_e probability_e, added up over layers, over every token of every response with its own prompt; and
    each expert's load [layers, experts] over an even one."""
    logits: list[list[Tensor]] = []
    for group in groups:
        for response in (0, 1):
            ids = torch.cat([torch.from_numpy(x).long() for x in (group.prompt_of(response), group.responses[response])])
            logits.append(list(model(ids[None], output_router_logits=True).router_logits))
    total, loads = torch.zeros(()), []
    for of_layer in zip(*logits, strict=True):
        scores = torch.cat([x.flatten(0, -2) for x in of_layer]).softmax(-1)
        num_experts, per_token = scores.shape[1], model.config.num_experts_per_tok
        share = torch.bincount(scores.topk(per_token).indices.flatten(), minlength=num_experts) / (len(scores) * per_token)
        total = total + num_experts * (share * scores.mean(0)).sum()
        loads.append(share * num_experts)
    return total, torch.stack(loads)


RATE = 0.01
MOVED = {
    1: [Case(Layout(), router_bias_update_rate=RATE)],
    2: [
        Case(Layout(data=2, expert=2), router_bias_update_rate=RATE, tokens_per_micro_batch=90, share_prompts=False),
        Case(Layout(tensor=2, sequence=True, expert=2), router_bias_update_rate=RATE, recompute="full"),
        Case(Layout(pipeline=2), router_bias_update_rate=RATE, tokens_per_micro_batch=90),
        Case(Layout(context=2, context_method="allgather"), router_bias_update_rate=RATE),
    ],
}
MOVED_FURTHER = {1: MOVED[1], 2: MOVED[2][::2]}
"""Over three steps: replicas, and stages."""


@pytest.mark.slow
def test_correction_biases_move_by_the_sign_of_the_global_batch_s_load_error_in_every_layout(tmp_path):
    policy = save_model(tmp_path / "policy", "glm4_moe", tokenizer=False, num_hidden_layers=2, first_k_dense_replace=0)
    groups = random_groups(7, seed=3)
    found = {1: found_in(MOVED, policy, policy, groups, 1), 3: found_in(MOVED_FURTHER, policy, policy, groups, 3)}
    model = oracle.load(policy)
    biases = {name: bias for name, bias in model.named_buffers() if name.endswith("e_score_correction_bias")}
    for (name, bias), counts in zip(biases.items(), _counts(model, groups), strict=True):
        expected = bias.double() + RATE * (counts.double().mean() - counts).sign()
        assert len(counts.unique()) > 1
        for case, outcome in found[1]:
            assert torch.allclose(outcome.weights[name].double(), expected, rtol=0, atol=1e-7), f"{case}: {name}"
        for case, outcome in found[3]:
            assert torch.equal(outcome.weights[name], found[3][0][1].weights[name]), f"{case}: {name}"


def _counts(model: torch.nn.Module, groups: list) -> list[Tensor]:
    """Of each layer, how many tokens each expert has, over every token of every response with its own prompt."""
    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    counts = [torch.zeros(model.config.n_routed_experts) for _ in routers]

    def count(number: int, output: tuple[Tensor, Tensor, Tensor]) -> None:
        counts[number] += torch.bincount(output[2].flatten(), minlength=len(counts[number]))

    handles = [
        router.register_forward_hook(lambda module, inputs, output, number=number: count(number, output))
        for number, router in enumerate(routers)
    ]
    oracle.all_logps(model, groups)
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.slow
def test_a_resident_reference_gives_margins_of_exactly_zero_at_step_0(tmp_path, dtype):
    policy: Path = save_model(tmp_path / "policy", "mixtral", tokenizer=False, num_hidden_layers=2)
    cases = [Case(Layout(data=2, expert=2)), Case(Layout(tensor=2, sequence=True, expert=2), share_prompts=False)]
    found = run_world(2, outcomes, policy, policy, random_groups(8), cases, 0, dtype)[0]
    for case, outcome in zip(cases, found, strict=True):
        assert len(outcome.margins) >= 8 and not outcome.margins.any(), str(case)


@pytest.mark.slow
def test_objectives_that_look_ahead_and_reward_models_are_exact_under_expert_parallelism(tmp_path):
    policy = save_model(tmp_path / "policy", "mixtral", tokenizer=False, num_hidden_layers=2)
    reference = save_model(tmp_path / "reference", "mixtral", seed=1, tokenizer=False, num_hidden_layers=2)
    groups = {kind: random_groups(9, seed=2, kind=kind) for kind in ("pairs", "labels")}
    objectives = [ObjectiveConfig(loss_type=name) for name in ("kto", "aot", "reward")]
    case = Case(Layout(data=2, expert=2), tokens_per_micro_batch=100)
    (alone,) = run_world(1, outcomes_of_objectives, policy, reference, groups, [Case(Layout())], objectives)[0]
    (spread,) = run_world(2, outcomes_of_objectives, policy, reference, groups, [case], objectives)[0]
    for objective, ours, theirs in zip(objectives, spread, alone, strict=True):
        worst, name = oracle.worst_relative_error(ours.gradients, theirs.gradients)
        assert worst <= 1e-5, f"{objective.loss_type}: {name} {worst}"
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-6), objective.loss_type
