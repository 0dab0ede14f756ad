"""Qwen3-MoE: Qwen3 with experts; some layers may keep a dense MLP (mlp_only_layers, decoder_sparse_step)."""

from __future__ import annotations

from typing import Any

from megadpo.model.families.common import Experts, Family, decoder_config, with_experts


def _transformer_config(hf_config: Any) -> dict[str, Any]:
    return with_experts(decoder_config(hf_config, add_qkv_bias=False, qk_layernorm=True), _experts(hf_config))


def _experts(hf_config: Any) -> Experts | None:
    layers = tuple(
        layer
        for layer in range(hf_config.num_hidden_layers)
        if layer not in hf_config.mlp_only_layers
        and hf_config.num_experts > 0
        and (layer + 1) % hf_config.decoder_sparse_step == 0
    )
    if not layers:
        return None
    return Experts(
        count=hf_config.num_experts,
        per_token=hf_config.num_experts_per_tok,
        columns=hf_config.moe_intermediate_size,
        renormalised=hf_config.norm_topk_prob,
        layers=layers,
    )


def _sliding_windows(hf_config: Any) -> list[int | None]:
    # Unlike Qwen3's: no layer_types, one window for all layers where there is one.
    return [hf_config.sliding_window] * hf_config.num_hidden_layers


QWEN3_MOE = Family(
    "qwen3_moe",
    ("Qwen3MoeForCausalLM",),
    "Qwen3MoeForSequenceClassification",
    _transformer_config,
    _sliding_windows,
    _experts,
)
