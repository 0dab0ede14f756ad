"""From a Hugging Face config to the shape of the model that it describes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megadpo.errors import UserError
from megadpo.model.families.heads import check_head, head_of
from megadpo.model.families.registry import as_config, family_of
from megadpo.model.families.rope import ropes_of
from megadpo.model.shape import Activation, Experts, ModelShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""``hidden_act`` in transformers' words."""


def shape_of(hf_config: PretrainedConfig | dict[str, Any]) -> ModelShape:
    """The shape of a transformers config, or of the dict that config.json holds.

    Raises:
        UserError: an unsupported architecture, activation, kind of rope or of layer, or a classifier of several labels.
    """
    hf_config = as_config(hf_config)
    family = family_of(hf_config)
    family.check(hf_config)
    num_heads = hf_config.num_attention_heads
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // num_heads
    facts = {"activation": _activation(hf_config, family.activation), **family.facts(hf_config)}
    windows, experts = family.sliding_windows(hf_config), family.experts(hf_config)
    _check_numbers(windows, experts)
    check_head(hf_config)
    return ModelShape(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_size=facts.pop("ffn_size", hf_config.intermediate_size),
        num_heads=num_heads,
        num_key_value_heads=getattr(hf_config, "num_key_value_heads", None) or num_heads,
        head_dim=latents.head_dim if (latents := facts.get("latents")) else head_dim,
        vocab_size=hf_config.vocab_size,
        max_positions=hf_config.max_position_embeddings,
        norm_epsilon=getattr(hf_config, family.norm_epsilon),
        tied_embeddings=bool(hf_config.tie_word_embeddings),
        windows=tuple(windows),
        ropes=ropes_of(hf_config, family, head_dim),
        experts=experts,
        head=head_of(hf_config),
        padding_token=hf_config.pad_token_id,
        **facts,
    )


def _check_numbers(windows: Sequence[int | None], experts: Experts | None) -> None:
    if any(window is not None and window < 1 for window in windows):
        raise UserError("the model's sliding_window is 0 or less, so that its layers would see nothing; null is no window")
    if experts is not None and not 1 <= experts.per_token <= experts.count:
        raise UserError(
            f"the model's num_experts_per_tok is {experts.per_token}, but a layer has {experts.count} experts; it must be 1 "
            f"to {experts.count}"
        )


def _activation(hf_config: PretrainedConfig, field: str) -> Activation:
    name = getattr(hf_config, field)
    if name not in ACTIVATIONS:
        raise UserError(f"the model's {field} is {name!r}; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
