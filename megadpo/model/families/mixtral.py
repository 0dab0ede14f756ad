"""Mixtral: Mistral with experts in place of every MLP; the chosen two of each token always add up to 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megadpo.model.families.common import Family, no_biases, refuse_jitter, window_on_every_layer
from megadpo.model.shape import Experts, Routing

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _experts(hf_config: PretrainedConfig) -> Experts:
    return Experts(
        count=hf_config.num_local_experts,
        per_token=hf_config.num_experts_per_tok,
        columns=hf_config.intermediate_size,
        routing=Routing(renormalised=True),
        layers=tuple(range(hf_config.num_hidden_layers)),
        block="block_sparse_moe",
        gate="w1",
        up="w3",
        down="w2",
    )


MIXTRAL = Family(
    "mixtral",
    ("MixtralForCausalLM",),
    "MixtralForSequenceClassification",
    window_on_every_layer,
    no_biases,
    experts=_experts,
    check=refuse_jitter,
)
