"""What a layer is made of: Megatron's own linear layers with our norm before them ("local"), or TransformerEngine's, which
have the norm built in and can multiply in FP8 ("transformer_engine").

Attention over the stream, norms of queries and keys, SwiGLU and all that is outside the layers stay ours. Parameters
have the local names in both cases: checkpoints and conversion know no difference.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from megadpo.config.schema import ModelConfig
from megadpo.errors import UserError

FUSED_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Parameters of a norm that is built into a linear layer, and their names where it is not."""

FP8_STREAM_MULTIPLE = 16
"""What the tokens of an FP8 product must be a multiple of."""


@dataclass(frozen=True)
class Layers:
    """What layers are made of.

    Attributes:
        kind: "local" or "transformer_engine".
        fp8: whether their products are in FP8.
    """

    kind: str = "local"
    fp8: bool = False

    def __str__(self) -> str:
        return self.kind + (" in FP8" if self.fp8 else "")

    def megatron_options(self) -> dict[str, Any]:
        """Fields of Megatron's TransformerConfig.

        A tensor is scaled by its own largest value, not by those of earlier steps: what is computed again, by the
        reference or after resuming, is computed alike. Weights in FP8 are not kept from one micro-batch to the next: only
        Megatron's schedules say when they have changed, ours and a moving reference do not.
        """
        if not self.fp8:
            return {}
        return {"fp8": "hybrid", "fp8_recipe": "tensorwise", "disable_parameter_transpose_cache": True}


def choose_layers(options: ModelConfig, device: torch.device, dtype: torch.dtype, only_local: str | None) -> Layers:
    """The layers that `model.layers` and `model.fp8` ask for.

    Args:
        only_local: what the model has that is built with local layers only, as `ModelShape.only_local`.

    Raises:
        UserError: they cannot be had on this device, or with this model.
    """
    if options.layers == "local":
        return Layers()
    reason = _why_no_transformer_engine(device, only_local)
    if reason is not None:
        raise UserError(f"model.layers is {options.layers}, but {reason}; set it to local")
    reason = _why_no_fp8(device, dtype) if options.fp8 else None
    if reason is not None:
        raise UserError(f"model.fp8 is true, but {reason}; remove it")
    return Layers(options.layers, options.fp8)


def _why_no_transformer_engine(device: torch.device, only_local: str | None) -> str | None:
    if device.type != "cuda":
        return "that needs a CUDA device, of which there is none"
    if importlib.util.find_spec("transformer_engine") is None:
        return "TransformerEngine is not installed"
    return None if only_local is None else f"the model has {only_local}, which are built with local layers only"


def _why_no_fp8(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype is not torch.bfloat16:
        return f"that goes with bf16 and this run computes in {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return f"that needs compute capability 8.9 and {torch.cuda.get_device_name(device)} has less"
    from transformer_engine.common import recipe

    return None if hasattr(recipe, "Float8CurrentScaling") else "the installed TransformerEngine is older than 2.2"


def local_name(name: str) -> str:
    """A Megatron parameter's name as local layers have it."""
    for fused, local in FUSED_NAMES.items():
        if name.endswith(f".{fused}"):
            return name.removesuffix(fused) + local
    return name
