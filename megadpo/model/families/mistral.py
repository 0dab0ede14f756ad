"""Mistral: Llama with one sliding window on every layer."""

from __future__ import annotations

from typing import Any

from megadpo.model.families.common import Family, decoder_config


def _transformer_config(hf_config: Any) -> dict[str, Any]:
    return decoder_config(hf_config, add_qkv_bias=False, qk_layernorm=False)


def _sliding_windows(hf_config: Any) -> list[int | None]:
    # transformers' Mistral pays no heed to layer_types.
    return [hf_config.sliding_window] * hf_config.num_hidden_layers


MISTRAL = Family(
    "mistral", ("MistralForCausalLM",), "MistralForSequenceClassification", _transformer_config, _sliding_windows
)
