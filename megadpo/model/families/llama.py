"""Llama 1, 2, 3 and 3.x."""

from __future__ import annotations

from typing import Any

from megadpo.model.families.common import Family, decoder_config


def _transformer_config(hf_config: Any) -> dict[str, Any]:
    return decoder_config(hf_config, add_qkv_bias=False, qk_layernorm=False)


def _sliding_windows(hf_config: Any) -> list[int | None]:
    return [None] * hf_config.num_hidden_layers


LLAMA = Family("llama", ("LlamaForCausalLM",), "LlamaForSequenceClassification", _transformer_config, _sliding_windows)
