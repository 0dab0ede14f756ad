"""Command-R (`cohere`) and Command-R7B and A (`cohere2`): attention and MLP side by side after one LayerNorm, rope turned by
neighbours, a factor on the logits. cohere2's layers with a sliding window have rope, its others none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megadpo.model.families.common import Family, biases_of_config, no_windows, windows_of_layer_types
from megadpo.model.shape import Norms

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _facts(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        "norms": Norms(before_mlp=None, kind="layer"),
        "is_parallel": True,
        "qk_norm": "heads" if getattr(hf_config, "use_qk_norm", False) else None,
        "rope_is_interleaved": True,
        "logits_multiplier": float(hf_config.logit_scale),
        **biases_of_config(hf_config, "attention_bias"),
    }


def _with_window(hf_config: PretrainedConfig) -> list[bool]:
    return [window is not None for window in windows_of_layer_types(hf_config)]


COHERE = Family("cohere", ("CohereForCausalLM",), None, no_windows, _facts, norm_epsilon="layer_norm_eps")
COHERE2 = Family(
    "cohere2",
    ("Cohere2ForCausalLM",),
    None,
    windows_of_layer_types,
    _facts,
    norm_epsilon="layer_norm_eps",
    with_rope=_with_window,
)
