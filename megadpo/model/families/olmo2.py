"""OLMo-2: norms of what attention and MLP give, none before them, and of all heads' queries and keys together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megadpo.model.families.common import Family, biases_of_config, no_windows
from megadpo.model.shape import Norms

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _facts(hf_config: PretrainedConfig) -> dict[str, Any]:
    norms = Norms(
        before_attention=None,
        after_attention="post_attention_layernorm",
        before_mlp=None,
        after_mlp="post_feedforward_layernorm",
    )
    return {"norms": norms, "qk_norm": "projection", **biases_of_config(hf_config, "attention_bias")}


OLMO2 = Family("olmo2", ("Olmo2ForCausalLM",), "Olmo2ForSequenceClassification", no_windows, _facts)
