"""Rotary frequencies, from transformers' own functions so that they are equal bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from megadpo.errors import UserError
from megadpo.model.families.common import Family
from megadpo.model.frequencies import ByLength, DynamicFrequencies, LongFrequencies, Rope

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SUPPORTED = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def ropes_of(hf_config: PretrainedConfig, family: Family, head_dim: int) -> tuple[Rope | None, ...]:
    """Each layer's rotary embedding; None where it has none. Layers with the same one share the object.

    Raises:
        UserError: a kind of rope that is not known, one that turns a part of the head or differs between layers where the
            family has no such layers.
    """
    parameters = hf_config.rope_parameters or {}
    if family.rope_by_layer_type and parameters.keys() >= set(hf_config.layer_types):
        by_type = {kind: _rope(hf_config, family, head_dim, parameters[kind], kind) for kind in set(hf_config.layer_types)}
        ropes: list[Rope | None] = [by_type[kind] for kind in hf_config.layer_types]
    else:
        ropes = [_rope(hf_config, family, head_dim, parameters, None)] * hf_config.num_hidden_layers
    if family.with_rope is not None:
        ropes = [rope if has_rope else None for rope, has_rope in zip(ropes, family.with_rope(hf_config), strict=True)]
    return tuple(ropes)


def _rope(
    hf_config: PretrainedConfig, family: Family, head_dim: int, parameters: Mapping[str, Any], layer_type: str | None
) -> Rope:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if "rope_theta" not in parameters:
        raise UserError("the model's rope_parameters have no rope_theta at the top; one rope for all layers is supported")
    kind, theta = parameters.get("rope_type", "default"), float(parameters["rope_theta"])
    if kind not in SUPPORTED:
        raise UserError(f"the model's rope_type is {kind!r}; supported: {', '.join(SUPPORTED)}")
    rotated = parameters.get("partial_rotary_factor")
    if rotated not in (None, 1, 1.0) and not family.rotates_part:
        raise UserError(
            f"the model's partial_rotary_factor is {rotated}; {family.name} is supported with rope on whole heads (1.0) only"
        )
    if kind == "default":
        num_columns = int(head_dim * (rotated or 1.0)) if family.rotates_part else head_dim
        exponents = torch.arange(0, num_columns, 2, dtype=torch.float) / num_columns
        return Rope(theta, 1.0 / (parameters["rope_theta"] ** exponents))
    which = {} if layer_type is None else {"layer_type": layer_type}
    inverse_frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"), **which)
    by_length: ByLength | None = None
    if kind == "dynamic":
        num_columns = 2 * len(inverse_frequencies)
        by_length = DynamicFrequencies(hf_config.max_position_embeddings, theta, float(parameters["factor"]), num_columns)
    if kind == "longrope":
        original = int(parameters["original_max_position_embeddings"])
        long, _ = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"), seq_len=original + 1, **which)
        by_length = LongFrequencies(original, long.float())
    return Rope(theta, inverse_frequencies.float(), float(scaling), by_length)
