"""GLM-4.5 to 4.7: rope on half of each head's columns, in halves; dense layers first, then mixtures with a shared expert and
DeepSeek-V3's routing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megadpo.model.families.common import Family, no_windows, refuse_biases
from megadpo.model.families.mixtures import experts_after_dense_layers, has_mixtures, refuse_others, sigmoid_routing
from megadpo.model.shape import Experts

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _facts(hf_config: PretrainedConfig) -> dict[str, Any]:
    refuse_biases(hf_config, "mlp_bias")
    return {"qkv_bias": bool(hf_config.attention_bias), "qk_norm": "head" if hf_config.use_qk_norm else None}


def _experts(hf_config: PretrainedConfig) -> Experts | None:
    if not has_mixtures(hf_config):
        return None
    refuse_others(hf_config, scoring_func="sigmoid", topk_method="noaux_tc")
    return experts_after_dense_layers(hf_config, sigmoid_routing(hf_config))


GLM4_MOE = Family("glm4_moe", ("Glm4MoeForCausalLM",), None, no_windows, _facts, _experts, rotates_part=True)
