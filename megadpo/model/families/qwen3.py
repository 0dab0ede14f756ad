"""Qwen3 (dense): an RMSNorm on each head's query and key; upper layers may have a sliding window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megadpo.model.families.common import Family, biases_of_config, windows_of_layer_types

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def qwen3_facts(hf_config: PretrainedConfig) -> dict[str, Any]:
    """Of the mixtures, too."""
    return {"qk_norm": "head", **biases_of_config(hf_config, "attention_bias")}


QWEN3 = Family("qwen3", ("Qwen3ForCausalLM",), "Qwen3ForSequenceClassification", windows_of_layer_types, qwen3_facts)
