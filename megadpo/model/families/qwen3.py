"""Qwen3 (dense): an RMSNorm on each head's query and key, no biases; upper layers may have a sliding window."""

from __future__ import annotations

from typing import Any

from megadpo.model.families.common import Family, decoder_config, windows_of_layer_types


def _transformer_config(hf_config: Any) -> dict[str, Any]:
    return decoder_config(hf_config, add_qkv_bias=False, qk_layernorm=True)


QWEN3 = Family("qwen3", ("Qwen3ForCausalLM",), "Qwen3ForSequenceClassification", _transformer_config, windows_of_layer_types)
