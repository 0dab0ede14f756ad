"""SmolLM3: Llama, of which every fourth layer has no rope (no_rope_layers)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megadpo.errors import UserError
from megadpo.model.families.common import Family, layers_with_rope, windows_of_layer_types

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _check(hf_config: PretrainedConfig) -> None:
    """transformers' masks ask layer_types alone, its flash attention asks use_sliding_window, too."""
    if "sliding_attention" in hf_config.layer_types and not hf_config.use_sliding_window:
        raise UserError(
            "the model's layer_types has 'sliding_attention', but its use_sliding_window is false; make one say what the "
            "other does"
        )


SMOLLM3 = Family(
    "smollm3",
    ("SmolLM3ForCausalLM",),
    "SmolLM3ForSequenceClassification",
    windows_of_layer_types,
    check=_check,
    with_rope=layers_with_rope,
)
