"""What attention of a packed stream on the CPU is computed from: blocks and batches, without a copy of any key and without
a large mask. cpu_flash.py computes them.

The keys that a segment sees are cut into a causal square (its own tokens) and rectangles that every query sees wholly (its
shared prompt; under context parallelism what stands before a piece). Responses that stand side by side share one rectangle
over their prompt. Under a sliding window a segment is cut into runs of queries with small masks.

Small groups are put into batches of about equal sizes instead, in which a small mask says who sees whom.

Axes: B units of a batch, L and M their queries and keys with padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megadpo.data.batches.micro_batch import Segment, ShardSegment

Range = tuple[int, int]

MAX_UNIT = 256
"""Tokens of a prompt with its responses up to which they are one unit of a batch, with a mask."""

FILLED = 0.7
"""A batch takes units of at least this part of its largest one's queries times keys; the rest is padding."""

MAX_BATCH = 1 << 22
"""Queries times keys of a batch, all units together: the size of its mask."""

WINDOW_ROWS = 512
"""Most queries of a block under a sliding window: each block's keys reach back from its first query."""


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
class PaddedBatch:
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

    batches: tuple[PaddedBatch, ...]
    blocks: tuple[Block, ...]


def blocks_of(segments: Sequence[Segment | ShardSegment], window: int | None, dtype: torch.dtype) -> Blocks:
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


def _families(segments: Sequence[Segment | ShardSegment]) -> Iterable[list[Segment | ShardSegment]]:
    """Runs of consecutive segments that share a prompt, the prompt's own segment included."""
    family: list[Segment | ShardSegment] = []
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


def _num_keys(segment: Segment | ShardSegment) -> int:
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


def _add_unwindowed(segment: Segment | ShardSegment, squares: list[Block], rectangles: list[Block]) -> None:
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


def _windowed(segment: Segment | ShardSegment, window: int, dtype: torch.dtype) -> list[Block]:
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
    """Consecutive segments that go into one entry of a batch."""

    segments: tuple[Segment | ShardSegment, ...]
    keys: tuple[Range, ...]

    @property
    def num_queries(self) -> int:
        return self.segments[-1].end - self.segments[0].start

    @property
    def num_keys(self) -> int:
        return sum(end - start for start, end in self.keys)

    def is_square(self, window: int | None) -> bool:
        return len(self.segments) == 1 and self.num_keys == self.num_queries and (window is None or self.num_keys <= window)


def _unit(family: Sequence[Segment | ShardSegment]) -> _Unit:
    ranges = [(s.prompt_start, s.prompt_end) for s in family] + [(s.keys.start, s.keys.stop) for s in family]
    return _Unit(tuple(family), _joined(ranges))


def _batches(units: Sequence[_Unit], window: int | None, dtype: torch.dtype) -> tuple[PaddedBatch, ...]:
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


def _batch(units: Sequence[_Unit], is_square: bool, window: int | None, dtype: torch.dtype) -> PaddedBatch:
    queries = _padded([np.arange(unit.segments[0].start, unit.segments[-1].end) for unit in units])
    keys = _padded([np.concatenate([np.arange(start, end) for start, end in unit.keys]) for unit in units])
    mask = None if is_square else additive(_visible(units, queries, keys, window), dtype)[:, None]
    return PaddedBatch(queries, keys, mask)


def _padded(rows: Sequence[np.ndarray]) -> Padded:
    lengths = np.array([len(row) for row in rows])[:, None]
    is_real = np.arange(lengths.max()) < lengths
    index, stream = np.empty(is_real.shape, np.int64), np.concatenate(rows)
    index[:] = np.array([row[0] for row in rows])[:, None]
    index[is_real] = stream
    return Padded(*map(torch.from_numpy, (index.ravel(), ~is_real, np.flatnonzero(is_real), stream)))


def _visible(units: Sequence[_Unit], queries: Padded, keys: Padded, window: int | None) -> Tensor:
    """bool [B, L, M], True where a query sees a key.

    Padding sees what its unit's last query sees, and no query sees padding.
    """
    ranges = np.concatenate([_visible_ranges(segment) for unit in units for segment in unit.segments])
    lengths = np.array([unit.num_queries for unit in units])[:, None]
    in_unit = np.minimum(np.arange(queries.is_padding.shape[1]), lengths - 1)
    ranges_BL4 = ranges[np.cumsum(lengths)[:, None] - lengths + in_unit]
    prompt_start, prompt_end, own_start, own_end = np.moveaxis(ranges_BL4[..., None], 2, 0)
    key = keys.index.view(keys.is_padding.shape).masked_fill(keys.is_padding, -1).numpy()[:, None]
    in_prompt = (key >= prompt_start) & (key < prompt_end)
    visible = in_prompt | ((key >= own_start) & (key < own_end))
    if window is not None:
        num_prompt = prompt_end - prompt_start
        position = np.where(in_prompt, key - prompt_start, num_prompt + key - own_start)
        visible &= num_prompt + own_end - own_start - position <= window
    return torch.from_numpy(visible)


def _visible_ranges(segment: Segment | ShardSegment) -> np.ndarray:
    """int64 [queries, 4]: the ranges of prompt and own keys that each query sees, windows left aside."""
    num_queries = segment.end - segment.start
    ranges = np.empty((num_queries, 4), np.int64)
    ranges[:, :3] = segment.prompt_start, segment.prompt_end, segment.keys.start
    ranges[:, 3] = np.arange(segment.keys.stop - num_queries, segment.keys.stop) + 1
    return ranges
