"""Mixtral: Mistral with experts in place of every MLP; the chosen two of each token always add up to 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megadpo.errors import UserError
from megadpo.model.families.common import Family, no_biases, window_on_every_layer
from megadpo.model.shape import Experts, Routing

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _refuse_jitter(hf_config: PretrainedConfig) -> None:
    if hf_config.router_jitter_noise:
        raise UserError(
            f"the model's router_jitter_noise is {hf_config.router_jitter_noise}; only 0 is supported: with noise, a "
            "reference equal to the policy would give other log-probs"
        )


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
    check=_refuse_jitter,
)
