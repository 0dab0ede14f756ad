"""Carries a program out: operations on this stage, messages to and from the stages around it.

Nobody waits for a send: what is sent is kept until it has gone. A receive is posted where the program says and waited
for where its operation begins. The sizes of messages are known on both sides beforehand, so only the tensors travel.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from megadpo.pipeline.program import Program, Receive, Send
from megadpo.pipeline.schedule import Op

MOST_SENDS_UNDER_WAY = 8
"""Sent tensors kept at most; the oldest has long gone when there are as many."""


class Operations(Protocol):
    """What the operations of a schedule do on one stage."""

    def run(self, op: Op, received: Tensor | None) -> Tensor | None:
        """Run `op` on the tensor that another stage's operation has sent for it; the tensor that another stage's reads."""
        ...

    def empty_message(self, op: Op) -> Tensor:
        """A tensor as large as what `op` receives."""
        ...


@dataclass
class Clock:
    """When each operation of this stage began and ended, by `time.perf_counter`."""

    times: list[tuple[Op, float, float]] = field(default_factory=list)


def execute(
    program: Program,
    operations: Operations,
    group: dist.ProcessGroup | None,
    held: dict[Op, Tensor] | None = None,
    clock: Clock | None = None,
) -> dict[Op, Tensor]:
    """Everything in the program; every stage of the pipeline calls it with its own.

    Args:
        group: the pipeline's, rank s for stage s; None: a single stage.
        held: what was received in an earlier program for operations of this one; taken out.
        clock: told when what was done.

    Returns:
        What was received for operations that are not in the program.
    """
    stage = 0 if group is None else dist.get_rank(group)
    inbox: dict[Op, tuple[Tensor, Any]] = {op: (tensor, None) for op, tensor in (held or {}).items()}
    under_way: deque[tuple[Any, Tensor]] = deque()
    made: Tensor | None = None
    for instruction in program:
        if isinstance(instruction, Receive):
            tensor = operations.empty_message(instruction.op)
            inbox[instruction.op] = (tensor, dist.irecv(tensor, **_between(group, instruction.source, stage, "src")))
        elif isinstance(instruction, Send):
            assert made is not None
            under_way.append((dist.isend(made, **_between(group, stage, instruction.to, "dst")), made))
            made = None
            if len(under_way) > MOST_SENDS_UNDER_WAY:
                under_way.popleft()[0].wait()
        else:
            received = _arrived(*inbox.pop(instruction)) if instruction in inbox else None
            started = time.perf_counter()
            made = operations.run(instruction, received)
            if clock is not None:
                clock.times.append((instruction, started, time.perf_counter()))
    for request, _ in under_way:
        request.wait()
    return {op: _arrived(*entry) for op, entry in inbox.items()}


def _arrived(tensor: Tensor, request: Any) -> Tensor:
    if request is not None:
        request.wait()
    return tensor


def _between(group: dist.ProcessGroup | None, source: int, target: int, end: str) -> dict[str, Any]:
    """The keywords of isend or irecv: the two directions go over groups of their own, so that over NCCL neither waits in
    the other's stream (Megatron does the same with two stages)."""
    assert group is not None
    rank = dist.get_global_rank(group, source if end == "src" else target)
    return {end: rank, "group": group if source < target else dist.group.WORLD}
