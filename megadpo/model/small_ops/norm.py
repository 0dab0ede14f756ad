"""The norm of Megatron's spec by Triton's kernels: alone (rms_norm.py), or with the residual add before it (add_norm.py)."""

from __future__ import annotations

from torch import Tensor

from megadpo.model.norm import RMSNorm
from megadpo.model.recompute import remember
from megadpo.model.residual import JoiningNorm
from megadpo.model.small_ops.add_norm import add_rms_norm
from megadpo.model.small_ops.rms_norm import MAX_COLUMNS, rms_norm


class TritonRMSNorm(JoiningNorm):
    """RMSNorm by these kernels; by torch's where a row is wider than they take."""

    reads_views = True

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.shape[-1] > MAX_COLUMNS:
            return super().normed(x, weight)
        assert self.eps is not None
        return rms_norm(x, self.applied(weight), self.eps)

    def added(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[-1] > MAX_COLUMNS:
            total = residual + x
            return total, RMSNorm.forward(self, total)
        assert self.eps is not None
        total, normed = add_rms_norm(x, residual, self.applied(self.weight), self.eps)
        remember(normed, self.normed, total, self.weight)
        return total, normed
