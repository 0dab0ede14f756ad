"""Gemma 2 and the text models of Gemma 3: norms before and after attention and MLP, whose weights are stored as w where
1 + w is applied; embeddings times sqrt(hidden size); windows on some layers; softcaps on scores and logits (2), or norms of
heads and another rope in the layers with windows (3)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from megadpo.errors import UserError
from megadpo.model.families.common import Family, biases_of_config, windows_of_layer_types
from megadpo.model.shape import Norms

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _facts(hf_config: PretrainedConfig) -> dict[str, Any]:
    norms = Norms(
        before_attention="input_layernorm",
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
        adds_one=True,
    )
    return {
        "norms": norms,
        "embedding_multiplier": math.sqrt(hf_config.hidden_size),
        "embedding_module_multiplies": True,
        "attention_multiplier": hf_config.query_pre_attn_scalar**-0.5,
        "logits_softcap": hf_config.final_logit_softcapping,
        **biases_of_config(hf_config, "attention_bias"),
    }


def _facts_of_2(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {**_facts(hf_config), "attention_softcap": hf_config.attn_logit_softcapping}


def _facts_of_3(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {**_facts(hf_config), "qk_norm": "head"}


def _check(hf_config: PretrainedConfig) -> None:
    if hf_config.use_bidirectional_attention:
        raise UserError("the model's config has use_bidirectional_attention: true; only causal attention is supported")


def _check_3(hf_config: PretrainedConfig) -> None:
    _check(hf_config)
    if hf_config.attn_logit_softcapping is not None:
        raise UserError(
            f"the model's config has attn_logit_softcapping: {hf_config.attn_logit_softcapping}, which transformers' Gemma 3"
            " does not compute; set it to null"
        )


GEMMA2 = Family(
    "gemma2",
    ("Gemma2ForCausalLM",),
    "Gemma2ForSequenceClassification",
    windows_of_layer_types,
    _facts_of_2,
    check=_check,
    activation="hidden_activation",
)
GEMMA3 = Family(
    "gemma3_text",
    ("Gemma3ForCausalLM",),
    "Gemma3TextForSequenceClassification",
    windows_of_layer_types,
    _facts_of_3,
    check=_check_3,
    activation="hidden_activation",
    rope_by_layer_type=True,
)
