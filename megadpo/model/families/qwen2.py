"""Qwen2 and Qwen2.5: biases on q, k and v; upper layers may have a sliding window."""

from __future__ import annotations

from typing import Any

from megadpo.model.families.common import Family, decoder_config, windows_of_layer_types


def _transformer_config(hf_config: Any) -> dict[str, Any]:
    return decoder_config(hf_config, add_qkv_bias=True, qk_layernorm=False)


QWEN2 = Family("qwen2", ("Qwen2ForCausalLM",), "Qwen2ForSequenceClassification", _transformer_config, windows_of_layer_types)
