"""GLM-4: rope on half of each head's columns, turned by neighbours, gate and up in one tensor; from GLM-4-0414 on (`glm4`)
norms both before and after attention and MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megadpo.model.families.common import Family, no_windows, refuse_biases
from megadpo.model.shape import Norms

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _glm_facts(hf_config: PretrainedConfig) -> dict[str, Any]:
    refuse_biases(hf_config, "mlp_bias")
    return {"qkv_bias": bool(hf_config.attention_bias), "fuses_gate_up": True, "rope_is_interleaved": True}


def _glm4_facts(hf_config: PretrainedConfig) -> dict[str, Any]:
    norms = Norms(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")
    return {"norms": norms, **_glm_facts(hf_config)}


GLM = Family("glm", ("GlmForCausalLM",), "GlmForSequenceClassification", no_windows, _glm_facts, rotates_part=True)
GLM4 = Family("glm4", ("Glm4ForCausalLM",), "Glm4ForSequenceClassification", no_windows, _glm4_facts, rotates_part=True)
