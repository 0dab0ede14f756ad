"""Keys (and values) as a kernel for sequences reads them, in one Triton kernel, and the sum of their gradients in another.

A prompt's keys are read by each of its responses, and a kernel that knows no grouped heads reads each head several times:
torch would write the gathered keys, then the repeated ones, and add gradients up in the same two steps, in bf16 and in no
fixed order. Here a copy is written once, and a gradient is the sum over its readers in float32, in order, rounded once.

Axes: S keys of the stream, G gathered keys, K key-value heads, C copies of each, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_NUMBERS = 2048
"""How many numbers of a key's heads a program has."""


@dataclass(frozen=True)
class Readers:
    """Of which key each gathered one is a copy, both ways round.

    Attributes:
        keys_G: int64, the stream's key that a gathered one is a copy of.
        places_G: int32, the gathered ones in the order of the stream's keys, copies of the same key as they lie.
        starts_S: int32 [S + 1], where in `places_G` those of each of the stream's keys begin, and the end of the last.
    """

    keys_G: Tensor
    places_G: Tensor
    starts_S: Tensor


def readers_of(keys_G: np.ndarray[Any, Any], num_keys: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """`places_G` and `starts_S` of `Readers`, from int64 `keys_G` with values below `num_keys`."""
    places_G = np.argsort(keys_G, kind="stable").astype(np.int32)
    starts_S = np.concatenate([[0], np.cumsum(np.bincount(keys_G, minlength=num_keys))]).astype(np.int32)
    return places_G, starts_S


def gather_keys(key_SKD: Tensor, readers: Readers, num_copies: int) -> Tensor:
    """[G, K * C, D], the copies of a head side by side; contiguous.

    Args:
        key_SKD: keys or values; a view of a packed projection too, only a head's columns must lie side by side, else they
            are copied.
    """
    return _GatherKeys.apply(key_SKD, readers, num_copies)


class _GatherKeys(torch.autograd.Function):
    """Keeps nothing of the keys."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, readers: Readers, num_copies: int) -> Tensor:
        ctx.readers, ctx.num_copies, ctx.shape = readers, num_copies, key.shape
        key = key if key.stride(-1) == 1 else key.contiguous()
        (_, num_heads, head_dim), num_gathered = key.shape, len(readers.keys_G)
        gathered = key.new_empty(num_gathered, num_heads * num_copies, head_dim)
        block = _block(num_heads, head_dim)
        if num_gathered:
            _copy[(num_gathered, triton.cdiv(num_heads, block["BLOCK_HEADS"]))](
                key, gathered, readers.keys_G, *key.stride()[:2], num_heads, head_dim, NUM_COPIES=num_copies, **block
            )
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient, (num_keys, num_heads, head_dim) = gradients[0].contiguous(), ctx.shape
        added, block = gradient.new_empty(ctx.shape), _block(num_heads, head_dim)
        if num_keys:
            _add[(num_keys, triton.cdiv(num_heads, block["BLOCK_HEADS"]))](
                gradient,
                added,
                ctx.readers.places_G,
                ctx.readers.starts_S,
                num_heads,
                head_dim,
                NUM_COPIES=ctx.num_copies,
                **block,
            )
        return added, None, None


def _block(num_heads: int, head_dim: int) -> dict[str, int]:
    columns = triton.next_power_of_2(head_dim)
    heads = min(triton.next_power_of_2(num_heads), max(1, BLOCK_NUMBERS // columns))
    return {"BLOCK_HEADS": heads, "BLOCK_COLUMNS": columns}


@triton.jit
def _copy(  # type: ignore[no-untyped-def]
    key,
    gathered,
    keys_G,
    stride,
    head_stride,
    num_heads,
    head_dim,
    NUM_COPIES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Some heads of one gathered key."""
    place = tl.program_id(0).to(tl.int64)
    source = tl.load(keys_G + place)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    columns = tl.arange(0, BLOCK_COLUMNS)[None, :]
    here = (heads < num_heads)[:, None] & (columns < head_dim)
    numbers = tl.load(key + source * stride + heads[:, None] * head_stride + columns, mask=here)
    to = (place * num_heads + heads[:, None]) * NUM_COPIES * head_dim + columns
    for copy in tl.static_range(NUM_COPIES):
        tl.store(gathered + to + copy * head_dim, numbers, mask=here)


@triton.jit
def _add(  # type: ignore[no-untyped-def]
    gathered,
    added,
    places_G,
    starts_S,
    num_heads,
    head_dim,
    NUM_COPIES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Some heads' gradient of one key of the stream."""
    number = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    columns = tl.arange(0, BLOCK_COLUMNS)[None, :]
    here = (heads < num_heads)[:, None] & (columns < head_dim)
    total = tl.zeros([BLOCK_HEADS, BLOCK_COLUMNS], dtype=tl.float32)
    for reader in range(tl.load(starts_S + number), tl.load(starts_S + number + 1)):
        place = tl.load(places_G + reader).to(tl.int64)
        at = (place * num_heads + heads[:, None]) * NUM_COPIES * head_dim + columns
        for copy in tl.static_range(NUM_COPIES):
            total += tl.load(gathered + at + copy * head_dim, mask=here, other=0.0).to(tl.float32)
    to = (number * num_heads + heads[:, None]) * head_dim + columns
    tl.store(added + to, total.to(added.dtype.element_ty), mask=here)
