"""Qwen3-Next: linear attention by gated delta nets in most layers; in the others a gate on attention's outputs and rope on a
part of each head; experts with a gated shared one; norms whose weights are stored as w where 1 + w is applied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megadpo.errors import UserError
from megadpo.model.families.common import Family, biases_of_config, no_windows
from megadpo.model.families.qwen3_moe import qwen_experts
from megadpo.model.shape import Experts, LinearAttention, Norms, SharedExpert

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LINEAR, FULL = "linear_attention", "full_attention"


def _facts(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        "norms": Norms(adds_one=True),
        "qk_norm": "head",
        "attention_gate": True,
        "linear": _linear_attention(hf_config),
        **biases_of_config(hf_config, "attention_bias"),
    }


def _linear_attention(hf_config: PretrainedConfig) -> LinearAttention | None:
    layers = tuple(layer for layer, kind in enumerate(hf_config.layer_types) if kind == LINEAR)
    if not layers:
        return None
    return LinearAttention(
        layers=layers,
        num_key_heads=hf_config.linear_num_key_heads,
        num_value_heads=hf_config.linear_num_value_heads,
        key_dim=hf_config.linear_key_head_dim,
        value_dim=hf_config.linear_value_head_dim,
        kernel_size=hf_config.linear_conv_kernel_dim,
    )


def _with_rope(hf_config: PretrainedConfig) -> list[bool]:
    """Of each layer: those with linear attention have none."""
    return [kind == FULL for kind in hf_config.layer_types]


def _check(hf_config: PretrainedConfig) -> None:
    """Refuse what the layers cannot express.

    Raises:
        UserError: kinds of layers, heads or an activation.
    """
    unknown = set(hf_config.layer_types) - {LINEAR, FULL}
    if unknown:
        raise UserError(f"the model's layer_types has {sorted(unknown)[0]!r}; only {FULL} and {LINEAR} are supported")
    for field in (
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_conv_kernel_dim",
    ):
        if getattr(hf_config, field) < 1:
            raise UserError(f"the model's {field} is {getattr(hf_config, field)}; it must be 1 or more")
    if hf_config.linear_num_value_heads % hf_config.linear_num_key_heads:
        raise UserError(
            f"the model's linear_num_value_heads is {hf_config.linear_num_value_heads}, which its linear_num_key_heads "
            f"{hf_config.linear_num_key_heads} do not divide"
        )
    if hf_config.hidden_act not in ("silu", "swish"):  # of the convolution, too
        raise UserError(
            f"the model's hidden_act is {hf_config.hidden_act!r}; {hf_config.model_type} is supported with silu only"
        )


def _experts(hf_config: PretrainedConfig) -> Experts | None:
    shared = SharedExpert(hf_config.shared_expert_intermediate_size, "shared_expert", has_gate=True)
    return qwen_experts(hf_config, shared)


QWEN3_NEXT = Family(
    "qwen3_next",
    ("Qwen3NextForCausalLM",),
    "Qwen3NextForSequenceClassification",
    no_windows,
    _facts,
    _experts,
    _check,
    rotates_part=True,
    with_rope=_with_rope,
)
