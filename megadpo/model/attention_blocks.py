"""Attention of a packed stream on the CPU, block by block, without a copy of any key and without a large mask.

The keys that a segment sees are cut into a causal square (its own tokens) and rectangles that every query sees wholly (its
shared prompt; under context parallelism what stands before a piece). torch's CPU flash kernel gives each block's output with
the logarithm of its softmax's denominator, by which outputs of different keys are merged into one; its backward needs
only the merged two, whatever the other keys were, so that each block goes back alone (as in ring attention,
arXiv:2310.01889). Responses that stand side by side share one rectangle over their prompt.

Small groups are put into batches of about equal sizes instead, in which a small mask says who sees whom: one call, no merge.

Axes: T queries, S keys of the stream, A query heads, K key-value heads, J query heads that share a key-value head, D head
dimension, B units of a batch, L and M their queries and keys with padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megadpo.data.micro_batch import Piece, Segment

Range = tuple[int, int]

MAX_UNIT = 256
"""Tokens of a prompt with its responses up to which they are one unit of a batch, with a mask."""

FILLED = 0.7
"""A batch takes units of at least this part of its largest one's queries times keys; the rest is padding."""

MAX_BATCH = 1 << 22
"""Queries times keys of a batch, all units together: the size of its mask."""

WINDOW_ROWS = 512
"""Most queries of a block under a sliding window: each block's keys reach back from its first query."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Block:
    """Consecutive queries with keys of up to two ranges of the stream.

    Attributes:
        is_first: nothing was written to these queries' outputs before; otherwise it is merged with what is there.
        is_causal: as many queries as keys, the last query sees all of them, each one before one key less.
        mask: added to the scores [queries, keys]; None: nothing is.
    """

    queries: Range
    keys: tuple[Range, ...]
    is_first: bool = True
    is_causal: bool = False
    mask: Tensor | None = None


@dataclass(frozen=True)
class Padded:
    """Places in the stream, in rows of equal length.

    Attributes:
        index: int64 [B * L]: places in the stream; a row's padding repeats its first one.
        is_padding: bool [B, L].
        real: int64, places in `index` that are no padding.
        stream: int64, `index` without padding.
    """

    index: Tensor
    is_padding: Tensor
    real: Tensor
    stream: Tensor


@dataclass(frozen=True)
class Batch:
    """Units of about equal sizes, padded to the largest; every query of theirs is in no other batch or block.

    Attributes:
        mask: [B, 1, L, M], added to the scores; None: every unit is a causal square.
    """

    queries: Padded
    keys: Padded
    mask: Tensor | None


@dataclass(frozen=True)
class Blocks:
    """All that a stream's attention is computed from."""

    batches: tuple[Batch, ...]
    blocks: tuple[Block, ...]


def blocks_of(segments: Sequence[Segment | Piece], window: int | None, dtype: torch.dtype) -> Blocks:
    """The blocks and batches of a stream whose segments have these queries and keys.

    Args:
        window: a query sees this many keys, itself included; None: all before it.
        dtype: of queries and keys, which the masks have too.
    """
    units: list[_Unit] = []
    squares: list[Block] = []
    rectangles: list[Block] = []
    for family in _families(segments):
        unit = _unit(family)
        if max(unit.num_queries, unit.num_keys) <= MAX_UNIT:
            units.append(unit)
            continue
        for segment in family:
            if window is not None and _num_keys(segment) > window:
                squares += _windowed(segment, window, dtype)
            else:
                _add_unwindowed(segment, squares, rectangles)
    return Blocks(_batches(units, window, dtype), (*squares, *rectangles))


def _families(segments: Sequence[Segment | Piece]) -> Iterable[list[Segment | Piece]]:
    """Segments side by side that have a prompt in common, or are it."""
    family: list[Segment | Piece] = []
    common: int | None = None
    for segment in segments:
        if segment.end == segment.start:
            continue
        first = segment.prompt_start if segment.prompt_end > segment.prompt_start else segment.keys.start
        if family and first != common:
            yield family
            family = []
        family.append(segment)
        common = first
    if family:
        yield family


def _num_keys(segment: Segment | Piece) -> int:
    return segment.keys.stop - segment.keys.start + segment.prompt_end - segment.prompt_start


def _joined(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The union of ranges, in order."""
    joined: list[Range] = []
    for start, end in sorted(ranges):
        if start == end:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return tuple(joined)


def _add_unwindowed(segment: Segment | Piece, squares: list[Block], rectangles: list[Block]) -> None:
    """A causal square over the segment's own tokens, and rectangles over the keys before them."""
    queries = (segment.start, segment.end)
    own = segment.keys.stop - (segment.end - segment.start)
    squares.append(Block(queries, ((own, segment.keys.stop),), is_causal=True))
    for keys in _joined([(segment.prompt_start, segment.prompt_end), (segment.keys.start, own)]):
        last = rectangles[-1] if rectangles else None
        if last is not None and last.keys == (keys,) and last.queries[1] == queries[0]:
            rectangles[-1] = replace(last, queries=(last.queries[0], queries[1]))
        else:
            rectangles.append(Block(queries, (keys,), is_first=False))


def _windowed(segment: Segment | Piece, window: int, dtype: torch.dtype) -> list[Block]:
    """Runs of queries with the keys that their windows reach; counted from the prompt's start, or the segment's own."""
    num_keys, num_prompt = _num_keys(segment), segment.prompt_end - segment.prompt_start
    before = num_keys - (segment.end - segment.start)
    blocks, masks = [], dict[tuple[int, int], Tensor]()
    step = min(WINDOW_ROWS, max(64, window // 2))
    for first in range(segment.start, segment.end, step):
        end = min(first + step, segment.end)
        last_key = before + end - segment.start
        first_key = max(0, before + first - segment.start - window + 1)
        size = (end - first, last_key - first_key)
        if size not in masks:
            masks[size] = additive(window_mask(*size, window), dtype)
        in_prompt = (segment.prompt_start + min(first_key, num_prompt), segment.prompt_start + min(last_key, num_prompt))
        in_own = tuple(segment.keys.start + max(0, key - num_prompt) for key in (first_key, last_key))
        keys = tuple((start, stop) for start, stop in (in_prompt, in_own) if stop > start)
        blocks.append(Block((first, end), keys, mask=masks[size]))
    return blocks


def window_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """bool [queries, keys], True where a query may look: the last query sees the last key, each one before one less, and
    each no more than `window` of them."""
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    return mask if window is None else mask.triu(num_keys - num_queries - window + 1)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `mask` is True, -inf elsewhere: the CPU kernel adds masks."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


@dataclass(frozen=True)
class _Unit:
    """Segments whose queries stand side by side and go into one entry of a batch."""

    segments: tuple[Segment | Piece, ...]
    keys: tuple[Range, ...]

    @property
    def num_queries(self) -> int:
        return self.segments[-1].end - self.segments[0].start

    @property
    def num_keys(self) -> int:
        return sum(end - start for start, end in self.keys)

    def is_square(self, window: int | None) -> bool:
        return len(self.segments) == 1 and self.num_keys == self.num_queries and (window is None or self.num_keys <= window)


def _unit(family: Sequence[Segment | Piece]) -> _Unit:
    ranges = [(s.prompt_start, s.prompt_end) for s in family] + [(s.keys.start, s.keys.stop) for s in family]
    return _Unit(tuple(family), _joined(ranges))


def _batches(units: Sequence[_Unit], window: int | None, dtype: torch.dtype) -> tuple[Batch, ...]:
    batches = []
    for is_square in (True, False):
        alike = [unit for unit in units if unit.is_square(window) is is_square]
        batches += [_batch(some, is_square, window, dtype) for some in _lots(alike)]
    return tuple(batches)


def _lots(units: Sequence[_Unit]) -> list[list[_Unit]]:
    """Units of about equal sizes together, so that little is padding."""
    lots: list[list[_Unit]] = []
    num_queries = num_keys = 0
    for unit in sorted(units, key=lambda unit: (unit.num_keys, unit.num_queries), reverse=True):
        lot = lots[-1] if lots else []
        largest = max(num_queries, unit.num_queries) * num_keys
        fits = lot and (len(lot) + 1) * largest <= MAX_BATCH
        if fits and min(u.num_queries * u.num_keys for u in (*lot[:1], unit)) >= FILLED * largest:
            lot.append(unit)
            num_queries = max(num_queries, unit.num_queries)
        else:
            lots.append([unit])
            num_queries, num_keys = unit.num_queries, unit.num_keys
    return lots


def _batch(units: Sequence[_Unit], is_square: bool, window: int | None, dtype: torch.dtype) -> Batch:
    queries = _padded([np.arange(unit.segments[0].start, unit.segments[-1].end) for unit in units])
    keys = _padded([np.concatenate([np.arange(start, end) for start, end in unit.keys]) for unit in units])
    mask = None if is_square else additive(_visible(units, queries, keys, window), dtype)[:, None]
    return Batch(queries, keys, mask)


def _padded(rows: Sequence[np.ndarray]) -> Padded:
    longest = max(map(len, rows))
    index = np.stack([np.pad(row, (0, longest - len(row)), constant_values=row[0]) for row in rows])
    is_padding = np.arange(longest) >= np.array([len(row) for row in rows])[:, None]
    real = np.flatnonzero(~is_padding)
    return Padded(*map(torch.from_numpy, (index.ravel(), is_padding, real, index.ravel()[real])))


def _visible(units: Sequence[_Unit], queries: Padded, keys: Padded, window: int | None) -> Tensor:
    """bool [B, L, M], True where a query may look; padding looks like its unit's last query, and nobody at padding."""
    longest = queries.is_padding.shape[1]
    sights = [np.concatenate([_sight(segment) for segment in unit.segments]) for unit in units]
    sight_BL4 = np.stack([np.pad(sight, ((0, longest - len(sight)), (0, 0)), mode="edge") for sight in sights])
    prompt_start, prompt_end, own_start, own_end = np.moveaxis(sight_BL4[..., None], 2, 0)
    key = keys.index.view(keys.is_padding.shape).masked_fill(keys.is_padding, -1).numpy()[:, None]
    in_prompt = (key >= prompt_start) & (key < prompt_end)
    visible = in_prompt | ((key >= own_start) & (key < own_end))
    if window is not None:
        num_prompt = prompt_end - prompt_start
        position = np.where(in_prompt, key - prompt_start, num_prompt + key - own_start)
        visible &= num_prompt + own_end - own_start - position <= window
    return torch.from_numpy(visible)


def _sight(segment: Segment | Piece) -> np.ndarray:
    """int64 [queries, 4]: the ranges of prompt and own keys that each query sees, windows left aside."""
    num_queries = segment.end - segment.start
    own_end = np.arange(segment.keys.stop - num_queries, segment.keys.stop) + 1
    ranges = np.array([segment.prompt_start, segment.prompt_end, segment.keys.start])
    return np.column_stack([np.broadcast_to(ranges, (num_queries, 3)), own_end])


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float) -> Tensor:
    """[T, A, D], from query [T, A, D], key and value [S, K, D] on the CPU."""
    return _BlockAttention.apply(query, key, value, blocks, scale)


class _BlockAttention(torch.autograd.Function):
    """One node of autograd for the whole stream; keeps what a flash kernel keeps: q, k, v, output and log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float) -> Tensor:
        wide = _wide(query.dtype)  # what is summed up over blocks is rounded once, at the end
        output = query.new_empty(query.shape, dtype=wide)
        lse_TA = query.new_empty(query.shape[:2], dtype=wide)
        for batch in blocks.batches:
            _forward_batch(query, key, value, batch, scale, output, lse_TA)
        for block in blocks.blocks:
            _forward_block(query, key, value, block, scale, output, lse_TA)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse_TA)
        ctx.blocks, ctx.scale = blocks, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse_TA = ctx.saved_tensors
        wide = _wide(query.dtype)
        d_query = query.new_empty(query.shape, dtype=wide)
        d_key, d_value = key.new_zeros(key.shape, dtype=wide), value.new_zeros(value.shape, dtype=wide)
        saved, gradients = (query, key, value, output, lse_TA), (d_query, d_key, d_value)
        for batch in ctx.blocks.batches:
            _backward_batch(d_output, saved, batch, ctx.scale, gradients)
        for block in ctx.blocks.blocks:
            _backward_block(d_output, saved, block, ctx.scale, gradients)
        return *(gradient.to(query.dtype) for gradient in gradients), None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _grouped(rows_NAD: Tensor, num_key_value_heads: int) -> Tensor:
    """A view [K, J, N, D] of [N, A, D]."""
    return rows_NAD.unflatten(1, (num_key_value_heads, -1)).permute(1, 2, 0, 3)


def _spread(rows_MKD: Tensor, num_sharing: int) -> Tensor:
    """A view [K, J, M, D] of [M, K, D]: every query head of a group reads the same keys."""
    return rows_MKD.transpose(0, 1)[:, None].expand(-1, num_sharing, -1, -1)


def _rows(tensor: Tensor, ranges: tuple[Range, ...]) -> Tensor:
    return torch.cat([tensor[start:end] for start, end in ranges]) if len(ranges) > 1 else tensor[slice(*ranges[0])]


def _block_operands(query: Tensor, key: Tensor, value: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    num_sharing = query.shape[1] // key.shape[1]
    keys, values = (_spread(_rows(x, block.keys), num_sharing) for x in (key, value))
    return _grouped(query[slice(*block.queries)], key.shape[1]), keys, values


def _forward_block(
    query: Tensor, key: Tensor, value: Tensor, block: Block, scale: float, output: Tensor, lse_TA: Tensor
) -> None:
    operands = _block_operands(query, key, value, block)
    new_KJND, new_lse_KJN = _forward(*operands, 0.0, block.is_causal, attn_mask=block.mask, scale=scale)
    new, new_lse = new_KJND.permute(2, 0, 1, 3).flatten(1, 2), new_lse_KJN.permute(2, 0, 1).flatten(1)
    there, lse = output[slice(*block.queries)], lse_TA[slice(*block.queries)]
    if block.is_first:
        there.copy_(new)
        lse.copy_(new_lse)
    else:
        there.lerp_(new.to(there.dtype), torch.sigmoid(new_lse - lse)[..., None])
        torch.logaddexp(lse, new_lse, out=lse)


def _backward_block(
    d_output: Tensor, saved: tuple[Tensor, ...], block: Block, scale: float, gradients: tuple[Tensor, Tensor, Tensor]
) -> None:
    query, key, value, output, lse_TA = saved
    operands, queries = _block_operands(query, key, value, block), slice(*block.queries)
    num_heads = key.shape[1]
    new_query, *new_keys = _backward(
        _grouped(d_output[queries], num_heads),
        *operands,
        _grouped(output[queries], num_heads),
        lse_TA[queries].unflatten(1, (num_heads, -1)).permute(1, 2, 0),
        0.0,
        block.is_causal,
        attn_mask=block.mask,
        scale=scale,
    )
    d_query, new_query = gradients[0][queries], new_query.permute(2, 0, 1, 3).flatten(1, 2)
    d_query.copy_(new_query) if block.is_first else d_query.add_(new_query)
    for gradient, new_KJMD in zip(gradients[1:], new_keys, strict=True):
        new = _shared(new_KJMD).transpose(0, 1)
        at = 0
        for start, end in block.keys:
            gradient[start:end] += new[at : at + end - start]
            at += end - start


def _shared(gradient_KJMD: Tensor) -> Tensor:
    """[K, M, D]: what the query heads of a group give their keys, added up."""
    if gradient_KJMD.shape[1] == 1:
        return gradient_KJMD[:, 0]
    return gradient_KJMD.sum(1, dtype=_wide(gradient_KJMD.dtype))


def _batch_operands(query: Tensor, key: Tensor, value: Tensor, batch: Batch) -> list[Tensor]:
    """[B, A, L, D] and twice [B, A, M, D]."""
    num_sharing = query.shape[1] // key.shape[1]
    operands = [_in_batch(query, batch.queries)]
    for rows in (key, value):
        padded_BKMD = _in_batch(rows, batch.keys)
        operands.append(padded_BKMD if num_sharing == 1 else padded_BKMD.repeat_interleave(num_sharing, dim=1))
    return operands


def _in_batch(rows: Tensor, places: Padded) -> Tensor:
    """[B, heads, L, D] of [stream, heads, D]."""
    return rows.index_select(0, places.index).unflatten(0, places.is_padding.shape).transpose(1, 2)


def _forward_batch(
    query: Tensor, key: Tensor, value: Tensor, batch: Batch, scale: float, output: Tensor, lse_TA: Tensor
) -> None:
    operands = _batch_operands(query, key, value, batch)
    new_BALD, new_lse_BAL = _forward(*operands, 0.0, batch.mask is None, attn_mask=batch.mask, scale=scale)
    for there, new in ((output, new_BALD), (lse_TA, new_lse_BAL)):
        there.index_copy_(0, batch.queries.stream, _real(new, batch.queries).to(there.dtype))


def _real(padded: Tensor, places: Padded) -> Tensor:
    """[rows that are no padding, heads, …] of [B, heads, L, …]."""
    return padded.transpose(1, 2).flatten(0, 1).index_select(0, places.real)


def _backward_batch(
    d_output: Tensor, saved: tuple[Tensor, ...], batch: Batch, scale: float, gradients: tuple[Tensor, Tensor, Tensor]
) -> None:
    query, key, value, output, lse_TA = saved
    # With a denominator of infinity, padding has weights of zero, and so no gradient.
    lse_BAL = _in_batch(lse_TA, batch.queries).masked_fill(batch.queries.is_padding[:, None], torch.inf)
    new_query, *new_keys = _backward(
        _in_batch(d_output, batch.queries),
        *_batch_operands(query, key, value, batch),
        _in_batch(output, batch.queries),
        lse_BAL,
        0.0,
        batch.mask is None,
        attn_mask=batch.mask,
        scale=scale,
    )
    gradients[0].index_copy_(0, batch.queries.stream, _real(new_query, batch.queries).to(gradients[0].dtype))
    for gradient, new_BAMD in zip(gradients[1:], new_keys, strict=True):
        new = _real(new_BAMD, batch.keys).unflatten(1, (key.shape[1], -1)).sum(2, dtype=gradient.dtype)
        gradient.index_add_(0, batch.keys.stream, new)
