"""AdamW whose moments are in host memory: tile by tile they come to the device, are updated there, and go back.

The update is the one of moments that never left, by torch's fused kernel on the device, where weights and gradients are: the
numbers are the same, and a host's cores, which the ranks of a machine share, have nothing to do with it. Tiles come and go
on streams of their own, both ways at once, beside the updates; the last ones go while the next step computes.

Small parameters share a tile, a large one is spread over several: a tile is one copy each way, and pinned memory is taken in
equal blocks of a power of two, which is what torch would round any other size up to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megadpo.engine.base import MOMENTS
from megadpo.engine.fused_adamw import update

TILE_ELEMENTS = 1 << 22
"""Of each moment; 32 MiB for both."""

ALIGNMENT = 64
"""Elements: where a parameter may begin in a tile."""

NUM_BUFFERS = 3
"""Tiles that are on the device: one comes, one is updated, one goes."""


class AdamWWithHostMoments(torch.optim.AdamW):
    """Parameters are flat, float32, on one device, with float32 gradients. `state` stays empty: see `moments`."""

    @classmethod
    def with_groups_of(cls, optimizer: torch.optim.Optimizer) -> AdamWWithHostMoments:
        """One with the parameter groups of another, whose parameters may be views (no leaves) by now."""
        new = cls([torch.empty(0)])
        new.param_groups = optimizer.param_groups
        new._allocate()
        return new

    def _allocate(self) -> None:
        """Moments of zero, and the buffers on the device."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        device = parameters[0].device if parameters else torch.device("cpu")
        self._tiles = _tiles(self.param_groups)
        self._parts: dict[Tensor, list[Tensor]] = {parameter: [] for parameter in parameters}
        for tile in self._tiles:
            tile.host = torch.zeros(2, TILE_ELEMENTS, pin_memory=device.type == "cuda")
            for piece in tile.pieces:
                self._parts[piece.parameter].append(tile.host[:, piece.place])
        self._num_steps = torch.zeros((), device=device)
        self._coming, self._going = _Lane(device), _Lane(device)
        self._buffers = torch.empty(min(NUM_BUFFERS, len(self._tiles)), 2, TILE_ELEMENTS, device=device)
        self._coming.keep(self._buffers)
        self._going.keep(self._buffers)
        self._free = [_now(device)] * len(self._buffers)
        """Of each buffer, when what it held last has gone."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        self._num_steps += 1
        arrived = self._fetch(0)
        for number, tile in enumerate(self._tiles):
            now_here, arrived = arrived, self._fetch(number + 1)
            _wait_for(now_here)
            slot = number % NUM_BUFFERS
            self._update(tile, self._buffers[slot])
            # A tile that is fetched in the next step finds its buffer free after it has gone itself: copies go in order.
            self._free[slot] = self._going.copy(tile.host, self._buffers[slot], after=_now(self._buffers.device))

    def _fetch(self, number: int) -> torch.cuda.Event | None:
        if number >= len(self._tiles):
            return None
        slot = number % NUM_BUFFERS
        return self._coming.copy(self._buffers[slot], self._tiles[number].host, after=self._free[slot])

    def _update(self, tile: _Tile, moments: Tensor) -> None:
        for number, group in enumerate(self.param_groups):
            pieces = [piece for piece in tile.pieces if piece.group == number and piece.parameter.grad is not None]
            if pieces:
                update(
                    [piece.parameter[piece.part] for piece in pieces],
                    [piece.parameter.grad[piece.part] for piece in pieces],  # type: ignore[index]
                    [[moment[piece.place] for piece in pieces] for moment in moments],
                    self._num_steps,
                    group,
                )

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """MOMENTS of a parameter, float32 of its shape, copies in host memory."""
        self._going.synchronize()
        both = torch.cat(self._parts[parameter], dim=1)
        return dict(zip(MOMENTS, both, strict=True))

    def set_moments(self, parameter: Tensor, moments: dict[str, Tensor], num_steps: int) -> None:
        """What `moments` gives, from any device, after `num_steps` steps (of all parameters)."""
        self._going.synchronize()
        self._num_steps.fill_(num_steps)
        start = 0
        for part in self._parts[parameter]:
            for kind, stored in zip(MOMENTS, part, strict=True):
                stored.copy_(moments[kind][start : start + len(stored)])
            start += part.shape[1]


@dataclass(frozen=True)
class _Piece:
    """A part of a parameter (of a group, by number), and its place in a tile."""

    parameter: Tensor
    group: int
    part: slice
    place: slice


@dataclass
class _Tile:
    pieces: list[_Piece] = field(default_factory=list)
    host: Tensor = field(default_factory=lambda: torch.empty(0))
    """[2, TILE_ELEMENTS]: MOMENTS."""


def _tiles(groups: Iterable[dict[str, Any]]) -> list[_Tile]:
    """All parameters, one after the other, over as few tiles as they need."""
    tiles: list[_Tile] = []
    num_taken = TILE_ELEMENTS
    for number, group in enumerate(groups):
        for parameter in group["params"]:
            start = 0
            while start < parameter.numel():
                if num_taken >= TILE_ELEMENTS:
                    tiles.append(_Tile())
                    num_taken = 0
                length = min(parameter.numel() - start, TILE_ELEMENTS - num_taken)
                part, place = slice(start, start + length), slice(num_taken, num_taken + length)
                tiles[-1].pieces.append(_Piece(parameter, number, part, place))
                start += length
                num_taken += -(-length // ALIGNMENT) * ALIGNMENT
    return tiles


class _Lane:
    """A stream of copies beside the computing; on a CPU, where only tests come, everything runs in its order."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def keep(self, buffers: Tensor) -> None:
        """Let nobody else have their memory before this lane has done with it."""
        if self.stream is not None:
            buffers.record_stream(self.stream)

    def copy(self, target: Tensor, source: Tensor, after: torch.cuda.Event | None) -> torch.cuda.Event | None:
        """Begin a copy once `after` has come to pass; when it is done."""
        if self.stream is None:
            target.copy_(source)
            return None
        assert after is not None
        self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()


def _now(device: torch.device) -> torch.cuda.Event | None:
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def _wait_for(event: torch.cuda.Event | None) -> None:
    if event is not None:
        torch.cuda.current_stream().wait_event(event)
