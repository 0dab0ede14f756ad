"""Llama 1, 2, 3 and 3.x."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megadpo.model.families.common import Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _no_windows(hf_config: PretrainedConfig) -> list[int | None]:
    return [None] * hf_config.num_hidden_layers


LLAMA = Family("llama", ("LlamaForCausalLM",), "LlamaForSequenceClassification", _no_windows)
