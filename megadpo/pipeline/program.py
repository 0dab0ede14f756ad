"""From a schedule to what each stage does, messages included, in an order that cannot dead-lock.

All operations and messages of all stages get one place in time: an operation where it ends, a message right after the
operation that makes it, what happens at once by the number of the stage. A stage's program is what concerns it of that
one list. So even if nothing were buffered and a send waited until its receive were posted, the earliest entry that is
not done could always be done: both sides have everything before it behind them. Sends that do not wait only make that
easier, and so do receives that are posted earlier, where a receive that waits holds up nothing else.

Messages from one stage to another are received in the order in which they are sent, so they need no names.
"""

from __future__ import annotations

from typing import NamedTuple

from megadpo.pipeline.schedule import Op, target_of
from megadpo.pipeline.simulate import Timing


class Send(NamedTuple):
    """What the operation before it has made goes to stage `to`, for its operation `op`."""

    to: int
    op: Op


class Receive(NamedTuple):
    """Be ready for what this stage's operation `op` reads, from stage `source`."""

    source: int
    op: Op


Instruction = Op | Send | Receive
Program = tuple[Instruction, ...]


def program(timing: Timing, stage: int, receives_early: bool) -> Program:
    """What `stage` does.

    Args:
        receives_early: be ready for a message that comes at the end of an operation before that operation, also where
            two stages would thus wait for each other if a posted receive held up what comes after it.
    """
    schedule = timing.schedule
    entries: list[tuple[tuple[float, int, int], Instruction]] = []
    neighbours = {(stage + step) % schedule.num_stages for step in (-1, 0, 1)}
    for other in neighbours:
        for op, end in zip(schedule.stages[other], timing.ends[other], strict=True):
            target = target_of(other, op, schedule.num_stages, schedule.num_chunks)
            if other == stage:
                entries.append(((end, stage, 0), op))
                if target is not None and target[0] != stage:
                    entries.append(((end, stage, 1), Send(*target)))
            elif target is not None and target[0] == stage:
                entries.append(((end, -1 if receives_early else other, 1), Receive(other, target[1])))
    entries.sort(key=lambda entry: entry[0])
    return tuple(instruction for _, instruction in entries)
