"""Qwen2 and Qwen2.5: biases on q, k and v; upper layers may have a sliding window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megadpo.model.families.common import Family, refuse_biases, windows_of_layer_types

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _facts(hf_config: PretrainedConfig) -> dict[str, Any]:
    refuse_biases(hf_config, "attention_bias", "mlp_bias")
    return {"qkv_bias": True}


QWEN2 = Family("qwen2", ("Qwen2ForCausalLM",), "Qwen2ForSequenceClassification", windows_of_layer_types, _facts)
