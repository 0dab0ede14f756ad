"""Configurations of every family, and logical tensors in memory."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.helpers.models import OWN_SIZES, PREFIXES

WIDE = {"num_key_value_heads": 4, "num_attention_heads": 8}


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


class DictSource:
    """Logical tensors in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, dim: int, start: int, length: int) -> torch.Tensor:
        return self.tensors[name].narrow(dim, start, length)


def config_of(family: str, **changes: Any) -> Any:
    if family == "mixtral":
        changes = {"num_local_experts": 4} | changes
    if family == "qwen3_moe":
        changes = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [1]} | changes
    if family in ("qwen2_moe", "glm4_moe", "llama4_text"):
        changes = OWN_SIZES[family] | changes
    if family == "qwen3_next":
        changes = OWN_SIZES[family] | {"linear_num_key_heads": 4} | changes
    if family == "gpt_oss":
        changes = {"num_local_experts": 4, "num_experts_per_tok": 2} | changes
    if family in ("ministral", "glm", "glm4", "gemma2", "gemma3_text", "gpt_oss"):
        changes = {"head_dim": 16} | changes
    if family.startswith("deepseek"):
        changes = OWN_SIZES[family] | {"num_key_value_heads": 8} | changes
    changes = {"pad_token_id": None} | changes
    sizes: dict[str, Any] = {
        "vocab_size": 499,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "max_position_embeddings": 2048,
        **WIDE,
    }
    return getattr(transformers, f"{PREFIXES[family]}Config")(**{**sizes, **changes})
