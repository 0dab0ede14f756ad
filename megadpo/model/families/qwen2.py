"""Qwen2 and Qwen2.5: biases on q, k and v; upper layers may have a sliding window."""

from __future__ import annotations

from megadpo.model.families.common import Family, windows_of_layer_types

QWEN2 = Family("qwen2", ("Qwen2ForCausalLM",), "Qwen2ForSequenceClassification", windows_of_layer_types, qkv_bias=True)
