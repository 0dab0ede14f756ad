"""What a step took and how well it used the devices, as metrics: seconds by part, the slowest rank, MFU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property

import torch

from megadpo.data.batches.bin_packing import IntArray
from megadpo.data.store import GroupStore
from megadpo.metrics.throughput import peak_memory, throughput
from megadpo.model.flop import AdapterWork, Work, peak_flop
from megadpo.parallel.world import rank, world_size
from megadpo.platform.device import compute_device
from megadpo.platform.step_clock import PARTS, StepClock
from megadpo.training.setup import RunSetup
from megadpo.training.slowest_rank import SlowestRank


class StepFigures:
    """The figures of a run's steps on this rank, one step after the other."""

    def __init__(self, setup: RunSetup) -> None:
        self._setup, self.clock, self._slowest = setup, StepClock(compute_device()), SlowestRank()
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._own_work = 0.0
        self._about_ranks: dict[str, float] = {}
        self._measured: tuple[GroupStore, Work] | None = None

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Within is a step."""
        self._seconds, self._about_ranks = dict.fromkeys(PARTS, 0.0), {}
        with self.clock.step():
            yield
        self._take()

    def compare_ranks(self) -> None:
        """Within a step, after its metrics were reduced. Collective."""
        self._take()
        self._about_ranks = self._slowest.exchange(self._own_work)
        self._own_work = 0.0

    def close(self) -> None:
        """After the last step; collective."""
        self._slowest.close()

    def _take(self) -> None:
        for part, seconds in self.clock.seconds().items():
            self._seconds[part] += seconds
            self._own_work += 0.0 if part == "communication" else seconds

    def metrics(
        self, step_seconds: float, groups: GroupStore, group_ids: IntArray, num_tokens: int, has_live_reference: bool
    ) -> dict[str, float]:
        """Of the step that has just ended, whose groups are `group_ids` of `groups`."""
        found = throughput(step_seconds, num_tokens, len(group_ids)) | peak_memory(compute_device())
        if self._peak is not None and rank() == 0:
            reference = self._setup.reference.shape if has_live_reference else None
            flop = self._work(groups).step(self._setup.policy.shape, reference, group_ids, self._adapter)
            found["mfu"] = flop / (step_seconds * world_size() * self._peak)
        return found | {f"seconds/{part}": seconds for part, seconds in self._seconds.items()} | self._about_ranks

    @cached_property
    def _peak(self) -> float | None:
        """FLOP a second of a device, or None where it is not known."""
        if self._setup.config.logging.peak_tflops is not None:
            return self._setup.config.logging.peak_tflops * 1e12
        if not torch.cuda.is_available() or self._setup.dtype is not torch.bfloat16:
            return None
        return peak_flop(torch.cuda.get_device_name(compute_device()))

    def _work(self, groups: GroupStore) -> Work:
        """What groups cost; those of the last call are remembered."""
        if self._measured is None or self._measured[0] is not groups:
            self._measured = groups, Work.of(groups, self._setup.policy.shape, self._setup.reference.shape)
        return self._measured[1]

    @cached_property
    def _adapter(self) -> AdapterWork | None:
        adapter = self._setup.adapter
        return None if adapter is None else AdapterWork.of(self._setup.policy.shape, adapter.spec)
