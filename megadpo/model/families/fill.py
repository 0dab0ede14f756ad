"""A parameter's shard, filled from where the model's tensors are."""

from __future__ import annotations

import torch
from torch import Tensor

from megadpo.model.families.common import ParameterShard, TensorSource


def fill_shard(shard: ParameterShard, source: TensorSource, out: Tensor) -> None:
    """Copy a shard's pieces from `source` into `out` [shard.shape], cast to its type; what no piece covers is zeroed.

    One piece at a time is in memory besides `out`.
    """
    assert tuple(out.shape) == shard.shape, (shard.name, tuple(out.shape), shard.shape)
    with torch.no_grad():
        if not shard.pieces or sum(piece.length for piece in shard.pieces) < out.shape[shard.pieces[0].dim]:
            out.zero_()
        for piece in shard.pieces:
            values = source.read(piece.logical_name, piece.dim, piece.logical_start, piece.length)
            out.narrow(piece.dim, piece.local_start, piece.length).copy_(values)
