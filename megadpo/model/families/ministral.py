"""Ministral: Mistral, of which layer_types says which layers have the sliding window."""

from __future__ import annotations

from megadpo.model.families.common import Family, no_biases, windows_of_layer_types

MINISTRAL = Family(
    "ministral",
    ("MinistralForCausalLM",),
    "MinistralForSequenceClassification",
    windows_of_layer_types,
    no_biases,
)
