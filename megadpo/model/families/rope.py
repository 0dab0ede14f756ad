"""Rotary frequencies, from transformers' own functions so that they are equal bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megadpo.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SUPPORTED = ("default", "linear", "llama3", "yarn")


def rope_of(hf_config: PretrainedConfig, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2], float32 on the CPU, and the factor on cosine and sine.

    Raises:
        UserError: a kind of rope that changes with the sequence's length (dynamic, longrope), rotates a part of the
            head only, or differs between layers.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = hf_config.rope_parameters or {}
    if "rope_theta" not in parameters:
        raise UserError("the model's rope_parameters have no rope_theta at the top; one rope for all layers is supported")
    kind = parameters.get("rope_type", "default")
    if kind not in SUPPORTED:
        raise UserError(f"the model's rope_type is {kind!r}; supported: {', '.join(SUPPORTED)}")
    rotated = parameters.get("partial_rotary_factor")
    if rotated not in (None, 1, 1.0):
        raise UserError(f"the model's partial_rotary_factor is {rotated}; only rope on whole heads (1.0) is supported")
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    inverse_frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
    return inverse_frequencies.float(), float(scaling)
