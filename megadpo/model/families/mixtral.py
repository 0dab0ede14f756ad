"""Mixtral: Mistral with experts in place of every MLP; the chosen two of each token always add up to 1."""

from __future__ import annotations

from typing import Any

from megadpo.errors import UserError
from megadpo.model.families.common import Experts, Family, decoder_config, with_experts


def _transformer_config(hf_config: Any) -> dict[str, Any]:
    if hf_config.router_jitter_noise:
        raise UserError(
            f"the model's router_jitter_noise is {hf_config.router_jitter_noise}; only 0 is supported: with noise, a "
            "reference equal to the policy would give other log-probs"
        )
    return with_experts(decoder_config(hf_config, add_qkv_bias=False, qk_layernorm=False), _experts(hf_config))


def _experts(hf_config: Any) -> Experts:
    return Experts(
        count=hf_config.num_local_experts,
        per_token=hf_config.num_experts_per_tok,
        columns=hf_config.intermediate_size,
        renormalised=True,
        layers=tuple(range(hf_config.num_hidden_layers)),
        block="block_sparse_moe",
        gate="w1",
        up="w3",
        down="w2",
    )


def _sliding_windows(hf_config: Any) -> list[int | None]:
    return [hf_config.sliding_window] * hf_config.num_hidden_layers


MIXTRAL = Family(
    "mixtral",
    ("MixtralForCausalLM",),
    "MixtralForSequenceClassification",
    _transformer_config,
    _sliding_windows,
    _experts,
)
