"""SmolLM3: Llama, of which every fourth layer has no rope (no_rope_layers)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megadpo.model.families.common import Family, windows_of_layer_types

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _windows(hf_config: PretrainedConfig) -> list[int | None]:
    windows = windows_of_layer_types(hf_config)
    return windows if hf_config.use_sliding_window else [None] * len(windows)


def _with_rope(hf_config: PretrainedConfig) -> list[bool]:
    return [bool(has_rope) for has_rope in hf_config.no_rope_layers]


SMOLLM3 = Family(
    "smollm3",
    ("SmolLM3ForCausalLM",),
    "SmolLM3ForSequenceClassification",
    _windows,
    with_rope=_with_rope,
)
