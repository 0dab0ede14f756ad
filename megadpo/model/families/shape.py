"""From a Hugging Face config to the shape of the model that it describes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megadpo.errors import UserError
from megadpo.model.families.heads import check_head, head_of
from megadpo.model.families.registry import as_config, family_of
from megadpo.model.families.rope import rope_of
from megadpo.model.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def shape_of(hf_config: PretrainedConfig | dict[str, Any]) -> ModelShape:
    """The shape of a transformers config, or of the dict that config.json holds.

    Raises:
        UserError: an unsupported architecture, activation, bias, kind of rope or of layer, or a classifier of several
            labels.
    """
    hf_config = as_config(hf_config)
    family = family_of(hf_config)
    family.check(hf_config)
    _check_layers(hf_config)
    num_heads = hf_config.num_attention_heads
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // num_heads
    windows = family.sliding_windows(hf_config)
    inverse_frequencies, rope_scaling = rope_of(hf_config, head_dim)
    check_head(hf_config)
    return ModelShape(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_size=hf_config.intermediate_size,
        num_heads=num_heads,
        num_key_value_heads=getattr(hf_config, "num_key_value_heads", None) or num_heads,
        head_dim=head_dim,
        vocab_size=hf_config.vocab_size,
        max_positions=hf_config.max_position_embeddings,
        norm_epsilon=hf_config.rms_norm_eps,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tied_embeddings=bool(hf_config.tie_word_embeddings),
        windows=tuple(windows),
        rope_scaling=rope_scaling,
        inverse_frequencies=inverse_frequencies,
        experts=family.experts(hf_config),
        head=head_of(hf_config),
        padding_token=hf_config.pad_token_id,
    )


def _check_layers(hf_config: PretrainedConfig) -> None:
    """Refuse activations and biases that a pre-norm decoder with RMSNorm and a SiLU-gated MLP has no place for."""
    if hf_config.hidden_act != "silu":
        raise UserError(f"the model's hidden_act is {hf_config.hidden_act!r}; only 'silu' is supported")
    for field in ("attention_bias", "mlp_bias"):
        if getattr(hf_config, field, False):
            raise UserError(f"the model's config has {field}: true; {hf_config.model_type} is supported without it only")
