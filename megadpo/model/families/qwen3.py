"""Qwen3 (dense): an RMSNorm on each head's query and key, no biases; upper layers may have a sliding window."""

from __future__ import annotations

from megadpo.model.families.common import Family, windows_of_layer_types

QWEN3 = Family("qwen3", ("Qwen3ForCausalLM",), "Qwen3ForSequenceClassification", windows_of_layer_types, qk_norm=True)
