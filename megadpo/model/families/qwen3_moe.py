"""Qwen3-MoE: Qwen3 with experts; some layers may keep a dense MLP (mlp_only_layers, decoder_sparse_step).

Unlike Qwen3 it has no layer_types: one window for all layers where there is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megadpo.model.families.common import Family, window_on_every_layer
from megadpo.model.families.mixtures import check_given
from megadpo.model.families.qwen3 import qwen3_facts
from megadpo.model.shape import Experts, Routing, SharedExpert

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def qwen_experts(hf_config: PretrainedConfig, shared: SharedExpert | None = None) -> Experts | None:
    """The mixtures of Qwen2-MoE and Qwen3-MoE; None where all layers are dense.

    Raises:
        UserError: a size that is missing, or less than 1.
    """
    check_given(hf_config, ["decoder_sparse_step"])
    layers = tuple(
        layer
        for layer in range(hf_config.num_hidden_layers)
        if layer not in hf_config.mlp_only_layers
        and hf_config.num_experts > 0
        and (layer + 1) % hf_config.decoder_sparse_step == 0
    )
    if not layers:
        return None
    of_shared = () if shared is None else ("shared_expert_intermediate_size",)
    check_given(hf_config, ["num_experts_per_tok", "moe_intermediate_size", *of_shared])
    return Experts(
        count=hf_config.num_experts,
        per_token=hf_config.num_experts_per_tok,
        columns=hf_config.moe_intermediate_size,
        routing=Routing(renormalised=hf_config.norm_topk_prob),
        layers=layers,
        shared=shared,
    )


QWEN3_MOE = Family(
    "qwen3_moe",
    ("Qwen3MoeForCausalLM",),
    "Qwen3MoeForSequenceClassification",
    window_on_every_layer,
    qwen3_facts,
    experts=qwen_experts,
)
