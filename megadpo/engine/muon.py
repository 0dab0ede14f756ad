"""Muon (https://kellerjordan.github.io/posts/muon/): orthogonalised momentum for the layers' matrices, by torch's Muon.

Newton-Schulz needs a whole matrix as Hugging Face has it. A rank keeps weights and momentum of flat ranges of Megatron's
shards, which stack queries, keys and values and are cut over tensor ranks. So the momentum, which is elementwise, is joined
over the data-parallel ranks, then gathered over the tensor ranks, parted into matrices and orthogonalised on every rank
alike, and each rank takes its own elements of the result. Nothing depends on the layout but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadpo.engine.optimizer import Piece
from megadpo.model.families import ParameterShard, ShardPiece
from megadpo.platform.device import compute_device

BUFFER = "momentum_buffer"
MOMENTUM = 0.95


@dataclass(frozen=True)
class MuonShard:
    """A parameter with matrices that Muon updates, as this rank has it.

    Attributes:
        replicas: the ranks with the same shard.
        tensor_ranks: those with the other parts of its matrices; None: each rank has them whole.
        names: of these matrices.
        pieces: this rank's elements of them, each with where its parameter begins in the flattened shard.
    """

    shard: ParameterShard
    replicas: dist.ProcessGroup
    tensor_ranks: dist.ProcessGroup | None
    names: frozenset[str]
    pieces: list[tuple[int, Piece]]


class Muon:
    """torch.optim.Muon with Nesterov momentum and `adjust_lr_fn="match_rms_adamw"`: updates as large as AdamW's.

    `state` has the momentum buffer of each piece's view.
    """

    def __init__(self, shards: Sequence[MuonShard], momentum: float | None, weight_decay: float) -> None:
        """Collective: every rank gives the same parameters in the same order. `momentum` None: MOMENTUM."""
        self._shards, self._weight_decay = list(shards), weight_decay
        self._momentum = MOMENTUM if momentum is None else momentum
        self._parts = [_parts_of_ranks(each) for each in self._shards]
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update every piece by the gradient that its parameter has. Collective."""
        for each, parts in zip(self._shards, self._parts, strict=True):
            updates = self._updates(each, parts).view(-1)
            for first, piece in each.pieces:
                own_rate = rate * piece.settings.factor
                if piece.settings.decays:
                    piece.view.mul_(1 - own_rate * self._weight_decay)
                piece.view.add_(updates[first + piece.place.start : first + piece.place.stop], alpha=own_rate)

    def _updates(self, each: MuonShard, parts: Sequence[Sequence[ShardPiece]]) -> Tensor:
        """What a rate of 1 adds to the shard, of its shape; zeros where Muon updates nothing."""
        direction = torch.zeros(math.prod(each.shard.shape), dtype=torch.float32, device=compute_device())
        for first, piece in each.pieces:
            assert piece.main.grad is not None
            gradient = piece.main.grad[piece.place]
            buffer = self.state.setdefault(piece.view, {}).setdefault(BUFFER, torch.zeros_like(piece.view))
            buffer.lerp_(gradient, 1 - self._momentum)
            place = slice(first + piece.place.start, first + piece.place.stop)
            direction[place] = gradient.lerp(buffer, self._momentum)
        if dist.get_world_size(each.replicas) > 1:
            dist.all_reduce(direction, group=each.replicas)  # each element is set on one of them
        shards = [direction.view(each.shard.shape)]
        if each.tensor_ranks is not None:
            own, shards = shards[0], [torch.empty_like(shards[0]) for _ in parts]
            dist.all_gather(shards, own, group=each.tensor_ranks)
        updates = torch.zeros(each.shard.shape, dtype=torch.float32, device=compute_device())
        for name, matrix in _matrices(each.names, shards, parts):
            update = _step_from_zero(matrix)
            for part in (part for part in each.shard.pieces if part.logical_name == name):
                values = update.narrow(part.dim, part.logical_start, part.length)
                updates.narrow(part.dim, part.local_start, part.length).copy_(values)
        return updates


def _parts_of_ranks(each: MuonShard) -> list[Sequence[ShardPiece]]:
    """Where Hugging Face tensors lie in the shard of each tensor rank."""
    if each.tensor_ranks is None:
        return [each.shard.pieces]
    found: list[Any] = [None] * dist.get_world_size(each.tensor_ranks)
    dist.all_gather_object(found, each.shard.pieces, each.tensor_ranks)
    return found


def _matrices(
    names: frozenset[str], shards: Sequence[Tensor], parts: Sequence[Sequence[ShardPiece]]
) -> Iterator[tuple[str, Tensor]]:
    """The whole matrices, by Hugging Face name, out of the tensor ranks' shards."""
    held: Mapping[str, list[tuple[Tensor, ShardPiece]]] = {name: [] for name in sorted(names)}
    for shard, pieces in zip(shards, parts, strict=True):
        for piece in pieces:
            if piece.logical_name in held:
                held[piece.logical_name].append((shard, piece))
    for name, pieces_of_it in held.items():
        shard, first = pieces_of_it[0]
        shape = list(shard.shape)
        shape[first.dim] = max(piece.logical_start + piece.length for _, piece in pieces_of_it)
        matrix = shard.new_empty(shape)
        for shard, piece in pieces_of_it:
            values = shard.narrow(piece.dim, piece.local_start, piece.length)
            matrix.narrow(piece.dim, piece.logical_start, piece.length).copy_(values)
        yield name, matrix


def _step_from_zero(direction: Tensor) -> Tensor:
    """What torch's Muon makes of zeros at a rate of 1, without momentum of its own: the scaled, orthogonalised direction."""
    zeros = torch.nn.Parameter(torch.zeros_like(direction))
    zeros.grad = direction
    options: dict[str, Any] = {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
    torch.optim.Muon([zeros], lr=1.0, adjust_lr_fn="match_rms_adamw", **options).step()
    return zeros.detach()
