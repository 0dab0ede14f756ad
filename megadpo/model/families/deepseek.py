"""DeepSeek-V2 and V3: multi-head latent attention; dense layers first, then mixtures with shared experts and groups of
experts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from megadpo.errors import UserError
from megadpo.model.families.common import Family, no_windows, refuse_biases
from megadpo.model.families.mixtures import (
    check_given,
    experts_after_dense_layers,
    has_mixtures,
    refuse_others,
    sigmoid_routing,
    softmax_routing,
)
from megadpo.model.shape import Experts, Latents

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LATENT_EPSILON = 1e-6
"""Of the latents' norms, in transformers and in DeepSeek's own code, whatever ``rms_norm_eps`` is."""


def _facts(hf_config: PretrainedConfig) -> dict[str, Any]:
    refuse_biases(hf_config, "attention_bias", "mlp_bias")
    latents = Latents(
        query_rank=hf_config.q_lora_rank,
        key_value_rank=hf_config.kv_lora_rank,
        plain_dim=hf_config.qk_nope_head_dim,
        rope_dim=hf_config.qk_rope_head_dim,
        value_dim=hf_config.v_head_dim,
        norm_epsilon=LATENT_EPSILON,
    )
    is_interleaved = bool(getattr(hf_config, "rope_interleave", True))
    if hf_config.model_type == "deepseek_v2" and not is_interleaved:
        raise UserError("the model's rope_interleave is false, which no deepseek_v2 model is computed with; leave it out")
    return {
        "latents": latents,
        "attention_multiplier": _yarn_factor(hf_config) ** 2 / math.sqrt(latents.head_dim),
        "rope_is_interleaved": is_interleaved,
    }


def _yarn_factor(hf_config: PretrainedConfig) -> float:
    """What `mscale_all_dim` makes of whole queries and keys (arXiv:2309.00071), rope being of another kind than default."""
    rope = hf_config.rope_parameters
    strength, factor = rope.get("mscale_all_dim"), rope.get("factor", 1.0)
    if rope.get("rope_type", "default") == "default" or not strength or factor <= 1:
        return 1.0
    return 0.1 * float(strength) * math.log(factor) + 1.0


_NUMBERS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "first_k_dense_replace")
_OF_MIXTURES = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts")
_OF_GROUPS = ("n_group", "topk_group")


def _check(hf_config: PretrainedConfig) -> None:
    check_given(hf_config, (*_NUMBERS, *(["q_lora_rank"] if hf_config.q_lora_rank is not None else [])))
    if has_mixtures(hf_config):
        has_groups = getattr(hf_config, "topk_method", "noaux_tc") != "greedy"
        check_given(hf_config, (*_OF_MIXTURES, *(_OF_GROUPS if has_groups else ())))
    heads, of_keys = hf_config.num_attention_heads, hf_config.num_key_value_heads
    if of_keys != heads:
        raise UserError(
            f"the model's num_key_value_heads is {of_keys}, but latents are made into keys and values of all {heads} heads "
            "(num_attention_heads); set it to that"
        )


def _experts_of_2(hf_config: PretrainedConfig) -> Experts | None:
    if not has_mixtures(hf_config):
        return None
    refuse_others(hf_config, scoring_func="softmax")
    return experts_after_dense_layers(hf_config, softmax_routing(hf_config))


def _experts_of_3(hf_config: PretrainedConfig) -> Experts | None:
    if not has_mixtures(hf_config):
        return None
    refuse_others(hf_config, scoring_func="sigmoid", topk_method="noaux_tc")
    return experts_after_dense_layers(hf_config, sigmoid_routing(hf_config))


DEEPSEEK_V2 = Family(
    "deepseek_v2",
    ("DeepseekV2ForCausalLM",),
    "DeepseekV2ForSequenceClassification",
    no_windows,
    _facts,
    _experts_of_2,
    check=_check,
)
DEEPSEEK_V3 = Family(
    "deepseek_v3",
    ("DeepseekV3ForCausalLM",),
    "DeepseekV3ForSequenceClassification",
    no_windows,
    _facts,
    _experts_of_3,
    check=_check,
)
