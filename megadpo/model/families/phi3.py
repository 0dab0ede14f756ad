"""Phi-3, Phi-3.5 and Phi-4: Llama with queries, keys and values in one tensor, and gate and up in one.

Rope may turn a part of each head (Phi-4-mini) and have other frequencies in long sequences (longrope).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megadpo.model.families.common import Family, no_biases, window_on_every_layer

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _facts(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {"fuses_qkv": True, "fuses_gate_up": True, **no_biases(hf_config)}


PHI3 = Family(
    "phi3",
    ("Phi3ForCausalLM",),
    "Phi3ForSequenceClassification",
    window_on_every_layer,
    _facts,
    rotates_part=True,
)
