"""Mistral: Llama with one sliding window on every layer."""

from __future__ import annotations

from megadpo.model.families.common import Family, no_biases, window_on_every_layer

MISTRAL = Family("mistral", ("MistralForCausalLM",), "MistralForSequenceClassification", window_on_every_layer, no_biases)
