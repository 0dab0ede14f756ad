"""The executor is as idle as the simulator says: with operations that sleep, so that four stages need no four cores."""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megadpo.pipeline.executor import Clock, carry_out
from megadpo.pipeline.fill import reference_before, with_reference
from megadpo.pipeline.program import program
from megadpo.pipeline.schedule import REFERENCE, Op, Schedule
from megadpo.pipeline.simulate import Costs, simulate
from tests.worlds import run_world

SECONDS = {"forward": 0.02, "backward": 0.04, "reference": 0.02, "ahead": 0.02}
NUM_MICRO_BATCHES, NUM_TRIES = 8, 3

pytestmark = pytest.mark.skipif(
    os.getloadavg()[0] > 2 * (os.cpu_count() or 1), reason="times mean nothing on a machine that is busy with other things"
)


class Sleeping:
    """Operations of a known duration; a message says which operation made it."""

    def __init__(self, num_stages: int) -> None:
        self.num_stages, self.wrong = num_stages, 0

    def do(self, op: Op, received: torch.Tensor | None) -> torch.Tensor:
        if received is not None:
            self.wrong += received.tolist() != self._content(op)
        time.sleep(SECONDS[op.kind])
        return torch.tensor(self._content(op))

    def empty(self, op: Op) -> torch.Tensor:
        return torch.empty(2)

    def _content(self, op: Op) -> list[float]:
        return [float(op.kind == "backward"), float(op.micro_batch)]


def shares(num_stages: int, interleaved: bool) -> list[tuple[float, float]]:
    """(measured, simulated) idle share of each try; of an interleaved schedule, of the second of two steps."""
    dist.init_process_group("gloo")
    found = []
    for _ in range(NUM_TRIES):
        done, held = None, {}
        for _ in range(2 if interleaved else 1):
            schedule = reference_before(num_stages, NUM_MICRO_BATCHES)
            if interleaved:
                schedule, done = with_reference(num_stages, NUM_MICRO_BATCHES, 1, done, NUM_MICRO_BATCHES)
            measured, costs, held = _step(schedule, held)
        found.append((measured, simulate(schedule, costs).idle_share))
    dist.destroy_process_group()
    return found


def _step(schedule: Schedule, held: dict[Op, Any]) -> tuple[float, Costs, dict[Op, Any]]:
    """The measured idle share, the measured costs, and what has come for the next step."""
    rank, work, clock = dist.get_rank(), Sleeping(schedule.num_stages), Clock()
    instructions = program(simulate(schedule, Costs()), rank, receives_early=True)
    dist.barrier()
    started = time.perf_counter()
    unread = carry_out(instructions, work, dist.group.WORLD, held, clock)
    dist.barrier()
    took = time.perf_counter() - started
    assert not work.wrong and [op for op, _, _ in clock.times] == list(schedule.stages[rank])
    by_kind: dict[str, list[float]] = {}
    for op, start, end in clock.times:
        by_kind.setdefault(REFERENCE if op.kind == "ahead" else op.kind, []).append(end - start)
    own = (1 - clock.busy / took, {kind: statistics.mean(times) for kind, times in by_kind.items()})
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    costs = Costs(**{kind: tuple(means[kind] for _, means in everyone) for kind in ("forward", "backward", REFERENCE)})
    held = {op._replace(kind=REFERENCE): tensor for op, tensor in unread.items()}
    return statistics.mean(share for share, _ in everyone), costs, held


@pytest.mark.parametrize("num_stages", [2, 4])
def test_reference_first_within_a_tenth_of_the_simulated_share(num_stages: int) -> None:
    found = run_world(num_stages, shares, num_stages, False)[0]
    assert min(abs(measured - simulated) / simulated for measured, simulated in found) <= 0.1, found


@pytest.mark.parametrize("num_stages", [2, 4])
def test_interleaved_within_two_hundredths_and_under_six_tenths_of_it(num_stages: int) -> None:
    found = run_world(num_stages, shares, num_stages, True)[0]
    assert min(abs(measured - simulated) for measured, simulated in found) <= 0.02, found
    base = simulate(reference_before(num_stages, NUM_MICRO_BATCHES), Costs()).idle_share
    assert min(measured for measured, _ in found) <= 0.6 * base, found
