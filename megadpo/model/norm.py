"""RMSNorm for Megatron's layer spec that also works with sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, its weight marked so that Megatron sums its gradient over the tensor ranks under
    sequence parallelism (Megatron's own wrapper of torch's norms refuses that)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - an attribute Megatron reads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The embedding's [T, 1, H] is a transposed view, and elementwise results keep such strides. torch.matmul goes
        # another way through those, not the same with and without gradients: policy and reference would differ by rounding.
        return super().forward(x).reshape(-1, x.shape[-1]).view(x.shape)
