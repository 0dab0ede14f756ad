"""Rotary embedding by position id, in GPTModel's rotary_pos_emb slot: a packed stream restarts its positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # it imports Megatron-core, for which `prepare_megatron` comes first
    from megadpo.model.attention.core import StreamParams


class PositionRope(torch.nn.Module):
    """Angles [T, 1, 1, D] of each stream token's position id."""

    def __init__(self, inverse_frequencies: Tensor) -> None:
        """`inverse_frequencies` [D / 2], float32, scaling included (transformers' ROPE_INIT_FUNCTIONS)."""
        super().__init__()
        # An attribute and no buffer: a cast of the model to bf16 must not touch the frequencies.
        self.inverse_frequencies = inverse_frequencies.float()

    def get_rotary_seq_len(self, *args: Any) -> StreamParams:
        """GPTModel asks here for what it hands to `forward`; the stream's parameters come last."""
        return args[-1]

    def forward(self, stream: StreamParams, **unused: Any) -> Tensor:
        """Rotation angles in float32, as Megatron's unfused rope wants them."""
        angles = self.angles(stream)
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]

    def angles(self, stream: StreamParams) -> Tensor:
        """[T, D / 2] in float32."""
        assert stream.micro_batch is not None
        positions_T = stream.micro_batch.local.positions_T
        self.inverse_frequencies = self.inverse_frequencies.to(positions_T.device)
        return torch.outer(positions_T.float(), self.inverse_frequencies)
