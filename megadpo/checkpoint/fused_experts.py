"""Model files in which all experts of a layer are one tensor (GPT-OSS, Llama 4), read and written as the tensors of single
experts, which is what everything else knows.

In the files ``gate_up_proj`` [E, H, 2 I] has a column of the gate and one of the up projection in turns, or in halves all of
the gate's first (`shape.Fused`); ``down_proj`` is [E, I, H], and GPT-OSS has a ``_bias`` of each. openai's own files have in
place of either a ``_blocks`` [E, rows, columns / 32, 16] and a ``_scales`` [E, rows, columns / 32]: MXFP4 (OCP Microscaling
1.0), two numbers of 4 bits a byte and a power of 2 for each 32 of them. They are read as bf16, which has all of their
values, and not written.

Axes: E experts, H hidden size, I inner size of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megadpo.errors import UserError
from megadpo.model.families import TensorSource
from megadpo.model.shape import Fused

_FUSED = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)(_bias|_blocks|_scales)?")
_SINGLE = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.(weight|bias)")

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the lower three bits; the fourth is the sign."""


@dataclass(frozen=True)
class _Place:
    """Where a single expert's tensor lies: which expert of the file's tensor (without _blocks), and which part of it."""

    fused: str
    number: int
    part: str
    is_bias: bool


class SingleExperts:
    """A TensorSource on one whose experts are fused."""

    def __init__(self, source: TensorSource, order: Fused = "in_turns") -> None:
        """Raises UserError where the fused tensors are not of the shapes above."""
        self._source, self._order = source, order
        self._others: list[str] = []
        self._places: dict[str, _Place] = {}
        self._last: tuple[str, int, Tensor] | None = None
        names = set(source.names())
        for name in source.names():
            match = _FUSED.fullmatch(name)
            if match is None:
                self._others.append(name)
                continue
            block, matrix, kind = match.groups()
            if kind == "_scales":
                continue
            if kind == "_blocks":
                _check_blocks(source, name, f"{block}.{matrix}_scales" in names)
            elif len(source.shape(name)) != (2 if kind == "_bias" else 3):
                raise UserError(
                    f"the model's {name} has shape {list(source.shape(name))}, which is not all experts' of a layer"
                )
            fused = name.removesuffix("_blocks")
            for number in range(source.shape(name)[0]):
                for part in ("gate_proj", "up_proj") if matrix == "gate_up_proj" else ("down_proj",):
                    single = f"{block}.{number}.{part}.{'bias' if kind == '_bias' else 'weight'}"
                    self._places[single] = _Place(fused, number, part, kind == "_bias")
        self._packed = {name.removesuffix("_blocks") for name in names if name.endswith("_blocks")}

    def names(self) -> Iterable[str]:
        return [*self._others, *self._places]

    def shape(self, name: str) -> tuple[int, ...]:
        place = self._places.get(name)
        if place is None:
            return self._source.shape(name)
        if place.fused in self._packed:
            _, num_rows, num_groups, num_bytes = self._source.shape(f"{place.fused}_blocks")
            rows, columns = num_rows, num_groups * num_bytes * 2
        elif place.is_bias:
            (_, rows), columns = self._source.shape(place.fused), 0
        else:
            _, columns, rows = self._source.shape(place.fused)
        rows = rows if place.part == "down_proj" else rows // 2
        return (rows,) if place.is_bias else (rows, columns)

    def dtype(self, name: str) -> torch.dtype:
        place = self._places.get(name)
        if place is None:
            return self._source.dtype(name)
        return torch.bfloat16 if place.fused in self._packed else self._source.dtype(place.fused)

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        """Reads all of an expert, which it keeps until the next one is asked for."""
        place = self._places.get(name)
        if place is None:
            return self._source.read(name, dim, start, length)
        rows = self._expert(place)
        if place.part != "down_proj":
            rows = rows[_columns_of(place.part, self._order, len(rows))]
        return rows.narrow(dim, start, length).contiguous()

    def _expert(self, place: _Place) -> Tensor:
        """[rows, columns] as a linear layer has them, or [rows] of a bias."""
        if self._last is None or self._last[:2] != (place.fused, place.number):
            self._last = (place.fused, place.number, self._read_expert(place))
        return self._last[2]

    def _read_expert(self, place: _Place) -> Tensor:
        if place.fused in self._packed:
            blocks, scales = (
                self._source.read(f"{place.fused}{kind}", 0, place.number, 1)[0] for kind in ("_blocks", "_scales")
            )
            return from_mxfp4(blocks, scales)
        expert = self._source.read(place.fused, 0, place.number, 1)[0]
        return expert if place.is_bias else expert.mT

    def release(self) -> None:
        self._last = None
        self._source.release()


def _check_blocks(source: TensorSource, name: str, has_scales: bool) -> None:
    scales, shape = name.removesuffix("_blocks") + "_scales", source.shape(name)
    if not has_scales:
        raise UserError(f"the model has {name}, but no {scales}; get it again")
    types = (source.dtype(name), source.dtype(scales))
    if len(shape) != 4 or shape[3] != 16 or source.shape(scales) != shape[:3] or types != (torch.uint8, torch.uint8):
        raise UserError(
            f"the model's {name} {list(shape)} and {scales} {list(source.shape(scales))} are not MXFP4's: uint8, 16 bytes "
            "to each scale; get it again"
        )


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """bf16 [rows, columns] of uint8 blocks [rows, columns / 32, 16] and scales [rows, columns / 32]; exact."""
    values = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)])
    numbers = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    factors = torch.exp2(scales.float() - 127)
    return (values[numbers.long()] * factors[..., None]).flatten(-2).to(torch.bfloat16)


def fused_names(names: Iterable[str]) -> list[str]:
    """The names that tensors with these names have in the files."""
    return list(dict.fromkeys(_fused_name(name) for name in names))


def _fused_name(name: str) -> str:
    match = _SINGLE.fullmatch(name)
    if match is None:
        return name
    block, _, part, kind = match.groups()
    return f"{block}.{'down_proj' if part == 'down_proj' else 'gate_up_proj'}{'_bias' if kind == 'bias' else ''}"


def _columns_of(part: str, order: Fused, num_columns: int) -> slice:
    """Those of ``gate_proj`` or ``up_proj`` among the `num_columns` of both."""
    number = int(part == "up_proj")
    if order == "in_turns":
        return slice(number, None, 2)
    return slice(number * num_columns // 2, (number + 1) * num_columns // 2)


def fused(tensors: Mapping[str, Tensor], order: Fused = "in_turns") -> dict[str, Tensor]:
    """Tensors as they are in the files, from all experts' of whole layers."""
    found: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for name in tensors:
        match = _SINGLE.fullmatch(name)
        if match is not None:
            counts[_fused_name(name)] = max(counts.get(_fused_name(name), 0), int(match[2]) + 1)
    for name, tensor in tensors.items():
        match = _SINGLE.fullmatch(name)
        if match is None:
            found[name] = tensor
            continue
        part, to = match[3], _fused_name(name)
        columns = tensor.mT if tensor.ndim == 2 else tensor
        num_columns = columns.shape[-1] * (1 if part == "down_proj" else 2)
        if to not in found:
            found[to] = columns.new_empty((counts[to], *columns.shape[:-1], num_columns))
        place = slice(None) if part == "down_proj" else _columns_of(part, order, num_columns)
        found[to][int(match[2])][..., place] = columns
    return found
