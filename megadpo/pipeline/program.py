"""From a simulated schedule to each stage's program: operations, sends and receives in an order that cannot dead-lock.

All operations and messages of all stages are sorted into one list: an operation by its end, a message right after the
operation whose result it sends, simultaneous entries by stage. A stage's program is its own entries of that list. Even if
no send were buffered (each blocking until its receive is posted), the earliest entry that is not done could always be
done, since both of its sides have finished everything before it. Asynchronous sends can only help, and so can receives
that are posted earlier, provided that a pending receive blocks nothing else.

Messages from one stage to another are received in the order in which they are sent, so they need no tags.
"""

from __future__ import annotations

from typing import NamedTuple

from megadpo.pipeline.schedule import Op, target_of
from megadpo.pipeline.simulate import Timing


class Send(NamedTuple):
    """Send the result of the operation before this instruction to stage `to`, for its operation `op`."""

    to: int
    op: Op


class Receive(NamedTuple):
    """Post the receive of what this stage's operation `op` reads, from stage `source`."""

    source: int
    op: Op


Instruction = Op | Send | Receive
Program = tuple[Instruction, ...]


def make_program(timing: Timing, stage: int, receives_early: bool) -> Program:
    """The program of `stage`.

    Args:
        receives_early: post the receive of a message that arrives while this stage runs an operation before that operation.
            Only where a posted receive does not block what comes after it: else two stages could wait for each other.
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
