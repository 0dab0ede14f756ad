"""Norms for Megatron's layer spec that also work with sequence parallelism, and keep little on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megadpo.model.recompute import recomputable


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, its weight marked so that Megatron sums its gradient over the tensor ranks under
    sequence parallelism (Megatron's own wrapper of torch's norms refuses that).

    Attributes:
        reads_views: whether heads may be given as they lie in a packed projection, uncopied.
    """

    reads_views = False

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, adds_one: bool = False, **unused: Any) -> None:
        """`adds_one`: the weight is stored as w where 1 + w is applied."""
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        self.adds_one = adds_one
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - an attribute Megatron reads

    def forward(self, x: Tensor) -> Tensor:
        return recomputable(self.normed, x, self.weight)

    def applied(self, weight: Tensor) -> Tensor:
        """What rows are multiplied by."""
        return 1.0 + weight.float() if self.adds_one else weight

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """[..., H], from x [..., H] and the norm's weight [H], which may be a copy."""
        weight = self.applied(weight)
        if x.device.type == "cpu" or self.adds_one:  # torch's kernel takes a weight of x's dtype only
            normed = _RMSNorm.apply(x, weight, self.eps)
        else:
            normed = F.rms_norm(x, self.normalized_shape, weight, self.eps)
        # The embedding's [T, 1, H] is a transposed view, and elementwise results keep such strides. torch.matmul goes
        # another way through those, not the same with and without gradients: policy and reference would differ by rounding.
        return normed.reshape(-1, x.shape[-1]).view(x.shape)


def unweighted_norm(x: Tensor, eps: float) -> Tensor:
    """[..., H]: x / rms(x), in float32, rounded once."""
    return _RMSNorm.apply(x, None, eps) if x.device.type == "cpu" else F.rms_norm(x, x.shape[-1:], None, eps)


class _RMSNorm(torch.autograd.Function):
    """What torch computes, from x [..., H] and weight [H], or None: x / rms(x) * weight, in float32, rounded once.

    On a CPU torch does it in steps, of which autograd keeps x and x / rms(x) in float32; here x as it came is kept and one
    number a row. (On CUDA torch has a kernel that does so.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        normed = wide * scale
        return (normed if weight is None else normed.mul_(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """With n = x scale and g = gradient weight: dx = scale (g - n mean(g n)), dweight = sum over rows of gradient n."""
        x, weight, scale = ctx.saved_tensors
        gradient = gradients[0].float()
        normed = x.float() * scale
        weight_gradient = None
        if ctx.needs_input_grad[1]:  # not of a frozen model
            weight_gradient = (gradient * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        gradient = gradient if weight is None else gradient * weight
        mean = (gradient * normed).mean(-1, keepdim=True)
        x_gradient = torch.addcmul(gradient, normed, mean, value=-1).mul_(scale)
        return x_gradient.to(x.dtype), weight_gradient, None


class LayerNorm(RMSNorm):
    """Cohere's LayerNorm, which has no bias: (x - mean) / deviation * weight, in float32, rounded once."""

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """[..., H], from x [..., H] and the norm's weight [H], which may be a copy."""
        normed = F.layer_norm(x.float(), x.shape[-1:], self.applied(weight).float(), None, self.eps or 0.0).to(x.dtype)
        return normed.reshape(-1, x.shape[-1]).view(x.shape)
