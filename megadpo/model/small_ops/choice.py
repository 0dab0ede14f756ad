"""Whose norm, SwiGLU and rope a model is made of: chosen once for a run, by device and what is installed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megadpo.errors import UserError
from megadpo.model.norm import RMSNorm
from megadpo.model.rope import PositionRope
from megadpo.model.swiglu import SwiGLU


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
