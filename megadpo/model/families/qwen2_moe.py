"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with experts and a gated shared one; some layers may keep a dense MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megadpo.model.families.common import Family, refuse_biases, windows_of_layer_types
from megadpo.model.families.qwen3_moe import qwen_experts
from megadpo.model.shape import Experts, SharedExpert

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _facts(hf_config: PretrainedConfig) -> dict[str, Any]:
    refuse_biases(hf_config, "attention_bias", "mlp_bias")
    return {"qkv_bias": bool(hf_config.qkv_bias)}


def _experts(hf_config: PretrainedConfig) -> Experts | None:
    shared = SharedExpert(hf_config.shared_expert_intermediate_size, "shared_expert", has_gate=True)
    return qwen_experts(hf_config, shared)


QWEN2_MOE = Family(
    "qwen2_moe", ("Qwen2MoeForCausalLM",), "Qwen2MoeForSequenceClassification", windows_of_layer_types, _facts, _experts
)
