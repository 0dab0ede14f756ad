"""Granite 3: Llama with factors on embeddings, residual adds, attention scores and logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megadpo.model.families.common import Family, biases_of_config, no_windows

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _facts(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        "embedding_multiplier": float(hf_config.embedding_multiplier),
        "residual_multiplier": float(hf_config.residual_multiplier),
        "attention_multiplier": float(hf_config.attention_multiplier),
        "logits_multiplier": 1.0 / hf_config.logits_scaling,
        **biases_of_config(hf_config),
    }


GRANITE = Family("granite", ("GraniteForCausalLM",), None, no_windows, _facts)
