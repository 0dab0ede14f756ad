"""Whose norm, SwiGLU and rope a model is made of: chosen once for a run, by device and what is installed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megadpo.errors import UserError
from megadpo.model.norm import LayerNorm, RMSNorm
from megadpo.model.rope import LayerRopes, PositionRope
from megadpo.model.shape import ModelShape
from megadpo.model.swiglu import SwiGLU, TanhGeGLU

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


@dataclass(frozen=True)
class SmallOps:
    """What is put into the slots of Megatron's spec, and its rotary slot.

    Attributes:
        name: "torch" or "triton".
    """

    name: str = "torch"
    norm: type[RMSNorm] = RMSNorm
    activation: type[SwiGLU] = SwiGLU
    rope: Callable[..., Any] = PositionRope

    def norm_of(self, shape: ModelShape) -> ModuleSpec:
        """The norm of a model's layers; LayerNorm is torch's."""
        from megatron.core.transformer.spec_utils import ModuleSpec

        kind = self.norm if shape.norms.kind == "rms" else LayerNorm
        return ModuleSpec(module=kind, params={"adds_one": shape.norms.adds_one})

    def activation_of(self, shape: ModelShape) -> type[SwiGLU]:
        """The activation of a model's MLPs; GELU is torch's."""
        return self.activation if shape.activation == "silu" else TanhGeGLU

    def rope_of(self, shape: ModelShape) -> torch.nn.Module:
        """What turns a model's queries and keys; torch's where it is not the same for whole heads in all layers."""
        plain = shape.plain_rope
        if plain is not None:
            return self.rope(plain.inverse_frequencies)
        return LayerRopes(
            shape.ropes,
            shape.rope_is_interleaved,
            turns_last=shape.latents is not None,
            norm_epsilon=shape.norm_epsilon if shape.norms_turned else None,
            temperature=shape.temperature,
        )


def choose_small_ops(requested: str, device: torch.device) -> SmallOps:
    """The operations that `model.small_ops` asks for.

    Raises:
        UserError: Triton's were asked for and cannot be had.
    """
    if requested == "torch":
        return SmallOps()
    reason = _why_no_triton(device)
    if requested == "auto" and (reason is not None or device.type != "cuda"):
        return SmallOps()
    if reason is not None:
        raise UserError(f"model.small_ops is {requested}, but {reason}; set it to auto")
    from megadpo.model.small_ops.norm import TritonRMSNorm
    from megadpo.model.small_ops.rope import TritonRope
    from megadpo.model.small_ops.swiglu import TritonSwiGLU

    return SmallOps("triton", TritonRMSNorm, TritonSwiGLU, TritonRope)


def _why_no_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda":  # its interpreter is for tests: some thousand times slower
        return None if os.environ.get("TRITON_INTERPRET") == "1" else "that needs a CUDA device, of which there is none"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"that needs compute capability 8.0 and {torch.cuda.get_device_name(device)} has less"
    return None
