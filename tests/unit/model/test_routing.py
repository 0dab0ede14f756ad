"""Routing gives transformers' experts, what they count, and the gradients of the router, by its own routers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config, Glm4MoeConfig, Llama4TextConfig, Qwen2MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

from megadpo.errors import UserError
from megadpo.model.families.llama4 import LLAMA4
from megadpo.model.families.mixtures import experts_after_dense_layers, sigmoid_routing, softmax_routing
from megadpo.model.families.qwen2_moe import QWEN2_MOE
from megadpo.model.moe.routing import route
from megadpo.model.shape import Routing

NUM_TOKENS, HIDDEN, NUM_EXPERTS, PER_TOKEN = 50, 16, 12, 3
SIZES: dict[str, Any] = {"hidden_size": HIDDEN, "num_experts_per_tok": PER_TOKEN, "num_attention_heads": 4}
OF_GROUPS: dict[str, Any] = {"n_routed_experts": NUM_EXPERTS, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
KINDS: dict[str, Any] = {
    "DeepSeek-V2": (DeepseekV2TopkRouter, DeepseekV2Config, {"topk_method": "group_limited_greedy"}, softmax_routing),
    "DeepSeek-V2-Lite": (DeepseekV2TopkRouter, DeepseekV2Config, {"topk_method": "greedy"}, softmax_routing),
    "DeepSeek-V3": (DeepseekV3TopkRouter, DeepseekV3Config, {}, sigmoid_routing),
    "not renormalised": (DeepseekV3TopkRouter, DeepseekV3Config, {"norm_topk_prob": False}, sigmoid_routing),
    "GLM-4.5": (Glm4MoeTopkRouter, Glm4MoeConfig, {"n_group": 1, "topk_group": 1}, sigmoid_routing),
    "Qwen2-MoE": (Qwen2MoeTopKRouter, Qwen2MoeConfig, {"num_experts": NUM_EXPERTS}, lambda c: _of_qwen(c).routing),
}


def _of_qwen(config: Any) -> Any:
    return QWEN2_MOE.experts(config)


def _random_router(kind: str, dtype: torch.dtype) -> tuple[Any, Routing]:
    router, config, changes, routing_of = KINDS[kind]
    made = config(**SIZES, **(({} if kind == "Qwen2-MoE" else OF_GROUPS) | changes))
    theirs = router(made)
    torch.manual_seed(0)
    with torch.no_grad():
        theirs.weight.normal_()
        theirs.to(dtype)
        if hasattr(theirs, "e_score_correction_bias"):
            theirs.e_score_correction_bias = torch.randn(NUM_EXPERTS)
    return theirs, routing_of(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_probabilities_and_gradients_are_those_of_transformers_router(kind: str, dtype: torch.dtype) -> None:
    theirs, routing = _random_router(kind, dtype)
    hidden_TH = torch.randn(NUM_TOKENS, HIDDEN).to(dtype)
    _, top_TK, expert_TK = theirs(hidden_TH)
    expected_TE = torch.zeros(NUM_TOKENS, NUM_EXPERTS).scatter(1, expert_TK, top_TK.float())
    counts_TE = torch.randn(NUM_TOKENS, NUM_EXPERTS)
    (expected_TE * counts_TE).sum().backward()
    weight, expected_gradient = theirs.weight.detach().clone().requires_grad_(), theirs.weight.grad
    wide = torch.float32 if routing.logits_in_float32 else dtype
    logits_TE = torch.nn.functional.linear(hidden_TH.to(wide), weight.to(wide))
    routed = route(logits_TE, routing, PER_TOKEN, getattr(theirs, "e_score_correction_bias", None))
    (routed.probabilities_TE * counts_TE).sum().backward()
    assert torch.equal(routed.chosen_TE, expected_TE > 0)
    # Qwen2-MoE's are rounded to the model's type, which here happens when an expert's columns are multiplied by them.
    rounding = 2**-8 if kind == "Qwen2-MoE" and dtype is torch.bfloat16 else 1e-6
    assert torch.allclose(routed.probabilities_TE, expected_TE, rtol=rounding, atol=0)
    error = (weight.grad.float() - expected_gradient.float()).norm() / expected_gradient.float().norm()  # type: ignore[union-attr]
    assert error <= (1e-2 if rounding > 1e-6 else 1e-6)


def test_shares_add_up_to_one_and_are_of_all_experts() -> None:
    for kind in ("DeepSeek-V2", "DeepSeek-V3"):
        theirs, routing = _random_router(kind, torch.float32)
        routed = route(
            torch.randn(NUM_TOKENS, NUM_EXPERTS), routing, PER_TOKEN, getattr(theirs, "e_score_correction_bias", None)
        )
        assert torch.allclose(routed.shares_TE.sum(1), torch.ones(NUM_TOKENS)) and (routed.shares_TE > 0).all()


def test_a_bias_decides_where_tokens_go_and_not_what_their_experts_count() -> None:
    logits_TE, bias_E = torch.randn(NUM_TOKENS, NUM_EXPERTS), torch.zeros(NUM_EXPERTS)
    bias_E[5] = 10.0
    routing = Routing(score_function="sigmoid", has_correction_bias=True)
    routed = route(logits_TE, routing, PER_TOKEN, bias_E)
    assert routed.chosen_TE[:, 5].all() and not route(logits_TE, routing, PER_TOKEN, 0 * bias_E).chosen_TE[:, 5].all()
    assert torch.allclose(routed.probabilities_TE[:, 5], logits_TE[:, 5].sigmoid())


def _config(**changes: Any) -> Any:
    return DeepseekV3Config(**(SIZES | OF_GROUPS | {"num_hidden_layers": 4, "first_k_dense_replace": 1} | changes))


def test_first_layers_are_dense_and_shared_experts_are_one() -> None:
    experts = experts_after_dense_layers(_config(n_shared_experts=2, moe_intermediate_size=40), sigmoid_routing(_config()))
    assert experts is not None and experts.layers == (1, 2, 3) and experts.shared_columns == 80
    assert experts_after_dense_layers(_config(first_k_dense_replace=4), sigmoid_routing(_config())) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_group": 5}, "n_group is 5, which does not divide its 12 experts"),
        ({"topk_group": 5}, "topk_group is 5, but there are 4 groups"),
        ({"n_group": 12}, "n_group is 12 of 12 experts, but a group is scored by its best two"),
        ({"topk_group": 1, "num_experts_per_tok": 4}, "num_experts_per_tok is 4, but a token's 1 groups .* have 3 experts"),
        ({"n_shared_experts": 0}, "n_shared_experts is 0; it must be 1 or more"),
    ],
)
def test_groups_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    config = _config(**changes)
    with pytest.raises(UserError, match=words):
        experts_after_dense_layers(config, sigmoid_routing(config))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'; supported"),
        ({"norm_topk_prob": True}, "norm_topk_prob: true"),
    ],
)
def test_what_transformers_deepseek_v2_does_not_read_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        softmax_routing(DeepseekV2Config(**changes))


def test_the_scores_of_a_group_are_those_of_its_best_two() -> None:
    """Two groups; the second has the best single expert, the first the best pair: written out by hand."""
    scores_E = torch.tensor([0.6, 0.6, 0.1, 0.9, 0.1, 0.1])
    logits_TE: Tensor = torch.logit(scores_E)[None]
    for group_score, expected in (("two_best", [0, 1]), ("max", [3, 4])):
        routing = Routing("sigmoid", num_groups=2, groups_per_token=1, group_score=group_score)  # type: ignore[arg-type]
        chosen = route(logits_TE, routing, 2).chosen_TE[0].nonzero().flatten().tolist()
        assert chosen == expected or (group_score == "max" and chosen == [3, 5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_llama_4_s_experts_are_those_of_the_largest_logits_also_where_their_sigmoids_are_equal(dtype: torch.dtype) -> None:
    config = Llama4TextConfig(hidden_size=HIDDEN, num_local_experts=NUM_EXPERTS, num_experts_per_tok=PER_TOKEN)
    made = LLAMA4.experts(config)
    assert made is not None and made.routing.scales_inputs
    torch.manual_seed(0)
    theirs, hidden_TH = Llama4Router(config).to(dtype), torch.randn(NUM_TOKENS, HIDDEN).to(dtype)
    with torch.no_grad():
        theirs.weight.normal_(std=8.0)
        scores_TE, logits_TE = theirs(hidden_TH)
    routed = route(logits_TE, made.routing, PER_TOKEN)
    assert (logits_TE.float().sigmoid() == 1.0).sum(1).max() > PER_TOKEN, "float32 has no larger sigmoid for some"
    assert torch.equal(routed.chosen_TE, scores_TE > 0)
    assert torch.equal(routed.probabilities_TE.to(dtype), scores_TE)
