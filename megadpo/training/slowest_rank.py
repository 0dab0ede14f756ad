"""Which rank the others wait for: every rank's own work in a step, without what it waits for others, compared.

Each step's figure is gathered while the next one runs and read there, so that nothing waits for it; a record has that of the
step before. Within a tensor- or context-parallel group ranks wait for each other in every layer: they look alike.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadpo.parallel.world import world_size
from megadpo.platform.device import compute_device


class SlowestRank:
    """Collective: every rank has one and calls its methods in the same order."""

    def __init__(self) -> None:
        self._gathering: tuple[Tensor, Any] | None = None

    def exchange(self, own_seconds: float) -> dict[str, float]:
        """Begin to gather this rank's seconds; of those that were gathered last, "slowest_rank" and its seconds over the
        median of all ranks, "slowest_rank_ratio". To be called where the device has nothing to do."""
        if world_size() == 1:
            return {}
        found = self._gathered()
        seconds_W = torch.empty(world_size(), dtype=torch.float64, device=compute_device())
        own = torch.full((1,), own_seconds, dtype=torch.float64, device=compute_device())
        self._gathering = seconds_W, dist.all_gather_into_tensor(seconds_W, own, async_op=True)
        return found

    def close(self) -> None:
        """Wait for what is under way: nobody closes a connection on which another one still reads."""
        self._gathered()

    def _gathered(self) -> dict[str, float]:
        if self._gathering is None:
            return {}
        (seconds_W, work), self._gathering = self._gathering, None
        work.wait()
        seconds = seconds_W.tolist()
        median = statistics.median(seconds)
        if not median > 0:
            return {}
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        return {"slowest_rank": slowest, "slowest_rank_ratio": seconds[slowest] / median}
