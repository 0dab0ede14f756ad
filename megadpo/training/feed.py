"""What gives each step its groups: a stored data set with a sampler, or a stream that is read as the run goes on."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from megadpo.data.batches.bin_packing import IntArray
from megadpo.data.batches.packed_dataset import PackedDataset
from megadpo.data.batches.sampler import StepSampler
from megadpo.data.rows.report import MOST_NAMED, DataReport
from megadpo.data.rows.stream import GroupStream, Position, StreamOptions
from megadpo.data.store import GroupStore
from megadpo.errors import UserError
from megadpo.platform.device import compute_device

if TYPE_CHECKING:
    from megadpo.training.setup import RunSetup


@dataclass(frozen=True)
class StepGroups:
    """The groups of a step.

    Attributes:
        packing: the data set that they are of.
        group_ids: int64, their places in it.
        position: of a stream: where it is after them.
    """

    packing: PackedDataset
    group_ids: IntArray
    position: Position | None = None


@dataclass(frozen=True)
class StoredFeed:
    """Steps of a data set that was tokenised first."""

    packing: PackedDataset
    sampler: StepSampler
    pairs_per_step: int

    def step(self, step: int) -> StepGroups:
        """Of step `step`, counted from 0. Pure."""
        return StepGroups(self.packing, self.sampler.group_ids(step))

    def epoch(self, step: int, position: Position | None) -> float:
        """Passes over the data after step `step`."""
        return (step + 1) * self.pairs_per_step / self.sampler.samples_per_epoch


class StreamFeed:
    """Steps of a stream, one after the other.

    Args:
        pack: makes a data set of the groups of a step; raises UserError where they do not fit.
    """

    def __init__(self, options: StreamOptions, pack: Callable[[GroupStore], PackedDataset], pairs_per_step: int) -> None:
        self._options, self._pack, self._pairs_per_step = options, pack, pairs_per_step
        self._stream: GroupStream | None = None
        self._position: Position | None = None
        self._next_step = 0

    def go_on(self, step: int, position: Position | None) -> None:
        """Begin with step `step` at a position; None: at the beginning of the rows."""
        self._next_step, self._position, self._stream = step, position, None

    def step(self, step: int) -> StepGroups:
        """Of step `step`, counted from 0: the one after that of the call before."""
        assert step == self._next_step, f"step {step} of a stream that is at step {self._next_step}"
        if self._stream is None:
            self._stream = GroupStream(self._options, self._position)
        groups = self._stream.next_groups(self._pairs_per_step)
        self._next_step += 1
        return StepGroups(self._pack(groups), np.arange(len(groups)), self._stream.position)

    def epoch(self, step: int, position: Position | None) -> float:
        """Whole passes over the data after step `step`."""
        return 0.0 if position is None else float(position.num_passes)


def feed_of(setup: RunSetup) -> StoredFeed | StreamFeed:
    """What gives the steps of a run their groups."""
    from megadpo.training.setup import checked_packing

    pairs_per_step = setup.config.train.pairs_per_step
    if setup.stream is None:
        assert setup.sampler is not None
        return StoredFeed(setup.train, setup.sampler, pairs_per_step)
    return StreamFeed(
        setup.stream, lambda groups: checked_packing(setup.config, groups, setup.policy, setup.layout), pairs_per_step
    )


def require_same_groups(groups: GroupStore) -> None:
    """That every rank has drawn the same groups from a stream, which each of them reads for itself. Collective.

    Raises:
        UserError: they have not, on every rank.
    """
    drawn = float(zlib.crc32(groups.digest.encode()))
    ends = torch.tensor([drawn, -drawn], dtype=torch.float64, device=compute_device())
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    largest, smallest = ends.tolist()
    if largest != -smallest:
        raise UserError(
            "data.train gave other rows to some processes than to others; files must not change while they are streamed, "
            "and an IterableDataset must give every process the same rows: give its shuffle a seed"
        )


def news(before: Position | None, now: Position) -> list[str]:
    """What has become of rows of a stream for the first time, and that a pass has ended, a line each."""
    earlier, later = DataReport() if before is None else before.report, now.report
    lines = [f"a row is left out ({reason})" for reason in later.dropped if reason not in earlier.dropped]
    if later.num_truncated and not earlier.num_truncated:
        lines.append("a row is longer than data.max_length and loses tokens")
    lines += [f"nothing reads the text in `{name}`" for name in later.unread if name not in earlier.unread]
    lines = [f"{line}; how many there were is said at the end" for line in lines[:MOST_NAMED]]
    if now.num_passes > (0 if before is None else before.num_passes):
        lines.append(f"pass {now.num_passes + 1} over the data has begun; so far {later.sentence()}")
    return lines
