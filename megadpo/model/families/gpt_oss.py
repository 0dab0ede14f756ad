"""GPT-OSS: attention with sinks, windows on every other layer, in each layer experts with biases and a clamped SwiGLU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megadpo.model.families.common import Family, biases_of_config, windows_of_layer_types
from megadpo.model.shape import Clamp, Experts, Routing

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _facts(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {"attention_sinks": True, **biases_of_config(hf_config, "attention_bias")}


def _experts(hf_config: PretrainedConfig) -> Experts:
    return Experts(
        count=hf_config.num_local_experts,
        per_token=hf_config.num_experts_per_tok,
        columns=hf_config.intermediate_size,
        # Its softmax over the chosen experts' logits is a softmax over all of them, scaled to add up to 1.
        routing=Routing(renormalised=True),
        layers=tuple(range(hf_config.num_hidden_layers)),
        router="router",
        has_biases=True,
        clamp=Clamp(float(hf_config.swiglu_alpha), float(hf_config.swiglu_limit)),
        fused="in_turns",
    )


GPT_OSS = Family(
    "gpt_oss",
    ("GptOssForCausalLM",),
    "GptOssForSequenceClassification",
    windows_of_layer_types,
    _facts,
    _experts,
)
