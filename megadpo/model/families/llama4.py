"""Llama 4 (text): most layers with rope by neighbours, a norm of what it has turned and attention in chunks, the others
without rope and with a temperature by position; mixtures on all or some layers, where scores multiply what experts read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megadpo.errors import UserError
from megadpo.model.families.common import Family, biases_of_config, layers_with_rope, no_windows, refuse_jitter
from megadpo.model.families.mixtures import check_given
from megadpo.model.shape import Experts, Routing, SharedExpert, Temperature

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BLOCK = "feed_forward"


def _facts(hf_config: PretrainedConfig) -> dict[str, Any]:
    temperature = Temperature(float(hf_config.attn_scale), float(hf_config.floor_scale))
    return {
        "ffn_size": hf_config.intermediate_size_mlp,
        "mlp_block": BLOCK,
        "norms_turned": bool(hf_config.use_qk_norm),
        "chunks": tuple(
            hf_config.attention_chunk_size if kind == "chunked_attention" else None for kind in hf_config.layer_types
        ),
        "temperature": temperature if hf_config.attn_temperature_tuning else None,
        "rope_is_interleaved": True,
        **biases_of_config(hf_config, "attention_bias"),
    }


def _experts(hf_config: PretrainedConfig) -> Experts | None:
    layers = tuple(layer for layer in range(hf_config.num_hidden_layers) if layer in hf_config.moe_layers)
    if not layers:
        return None
    return Experts(
        count=hf_config.num_local_experts,
        per_token=hf_config.num_experts_per_tok,
        columns=hf_config.intermediate_size,
        routing=Routing(score_function="sigmoid", chooses_by_logits=True, scales_inputs=True),
        layers=layers,
        shared=SharedExpert(hf_config.intermediate_size, "shared_expert"),
        block=BLOCK,
        router="router",
        fused="in_halves",
    )


def _check(hf_config: PretrainedConfig) -> None:
    refuse_jitter(hf_config)
    check_given(hf_config, ["intermediate_size", "intermediate_size_mlp", "num_local_experts", "num_experts_per_tok"])
    unknown = set(hf_config.layer_types) - {"full_attention", "chunked_attention"}
    if unknown:
        raise UserError(
            f"the model's layer_types has {sorted(unknown)[0]!r}; {hf_config.model_type} is supported with full and chunked "
            "attention only"
        )
    if (hf_config.attention_chunk_size or 0) < 1:  # transformers computes no model without it, chunked layers or not
        raise UserError(
            f"the model's attention_chunk_size is {hf_config.attention_chunk_size}; it must be 1 or more, and where "
            "tokens are to see all before them, max_position_embeddings"
        )
    if hf_config.attn_temperature_tuning and hf_config.floor_scale <= 0:
        raise UserError(
            f"the model's floor_scale is {hf_config.floor_scale}; with attn_temperature_tuning it must be more than 0"
        )


LLAMA4 = Family(
    "llama4_text",
    ("Llama4ForCausalLM",),
    None,
    no_windows,
    _facts,
    _experts,
    check=_check,
    with_rope=layers_with_rope,
)
