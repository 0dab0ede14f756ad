"""Model families: Hugging Face config and names <-> Megatron config and names. One file a family."""

from __future__ import annotations

from typing import Any

from megadpo.model.families.check import check_tensors
from megadpo.model.families.common import HEAD, SCORE, Experts, Family, ParameterShard, Piece, Place, TensorSource
from megadpo.model.families.heads import Head, check_head, head_of, head_settings, with_reward_head
from megadpo.model.families.registry import FAMILIES, as_config, family_of
from megadpo.model.families.rope import rope_of
from megadpo.model.families.shards import logical_shapes, shard_parameters

__all__ = [
    "FAMILIES",
    "HEAD",
    "SCORE",
    "Experts",
    "Family",
    "Head",
    "ParameterShard",
    "Piece",
    "Place",
    "TensorSource",
    "as_config",
    "check_head",
    "check_tensors",
    "experts_of",
    "family_of",
    "head_of",
    "head_settings",
    "logical_shapes",
    "rope_of",
    "shard_parameters",
    "sliding_windows",
    "transformer_config_kwargs",
    "with_reward_head",
]


def transformer_config_kwargs(hf_config: Any) -> dict[str, Any]:
    """Arguments of megatron.core's TransformerConfig that the model decides; those of the layout are the builder's.

    Raises:
        UserError: an unsupported architecture, activation or bias.
    """
    hf_config = as_config(hf_config)
    return family_of(hf_config).transformer_config(hf_config)


def experts_of(hf_config: Any) -> Experts | None:
    """The model's mixtures of experts; None of a dense model."""
    hf_config = as_config(hf_config)
    return family_of(hf_config).experts(hf_config)


def sliding_windows(hf_config: Any) -> list[int | None]:
    """For each layer, how many tokens a token attends to, itself included; None = all before it.

    Equal to transformers 5.23: a query at position i sees keys at positions j with i - window < j <= i.
    """
    hf_config = as_config(hf_config)
    return family_of(hf_config).sliding_windows(hf_config)
