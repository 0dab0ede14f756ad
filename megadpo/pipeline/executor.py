"""Executes a program: operations on this stage, messages to and from its neighbours.

Sends are asynchronous: a sent tensor is kept until its send has completed. A receive is posted where the program says and
waited for where its operation begins. Both sides know the shapes of messages beforehand, so only the tensors are sent.
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
from megadpo.platform.step_clock import part

MAX_PENDING_SENDS = 8
"""Sent tensors kept at most; the oldest send has completed long before there are as many."""


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
    """Execute this stage's program; collective: every stage of the pipeline executes its own.

    Args:
        group: the pipeline's, rank s for stage s; None: a single stage.
        held: what was received in an earlier program for operations of this one.
        clock: records when each operation began and ended.

    Returns:
        What was received for operations that are not in the program, by operation.
    """
    stage = 0 if group is None else dist.get_rank(group)
    inbox: dict[Op, tuple[Tensor, Any]] = {op: (tensor, None) for op, tensor in (held or {}).items()}
    pending_sends: deque[tuple[Any, Tensor]] = deque()
    made: Tensor | None = None
    for instruction in program:
        if isinstance(instruction, Receive):
            tensor = operations.empty_message(instruction.op)
            inbox[instruction.op] = (tensor, dist.irecv(tensor, **_between(group, instruction.source, stage, "src")))
        elif isinstance(instruction, Send):
            assert made is not None
            pending_sends.append((dist.isend(made, **_between(group, stage, instruction.to, "dst")), made))
            made = None
            if len(pending_sends) > MAX_PENDING_SENDS:
                with part("communication"):
                    pending_sends.popleft()[0].wait()
        else:
            received = _arrived(*inbox.pop(instruction)) if instruction in inbox else None
            started = time.perf_counter()
            made = operations.run(instruction, received)
            if clock is not None:
                clock.times.append((instruction, started, time.perf_counter()))
    with part("communication"):
        for request, _ in pending_sends:
            request.wait()
    return {op: _arrived(*entry) for op, entry in inbox.items()}


def _arrived(tensor: Tensor, request: Any) -> Tensor:
    if request is not None:
        with part("communication"):
            request.wait()
    return tensor


def _between(group: dist.ProcessGroup | None, source: int, target: int, end: str) -> dict[str, Any]:
    """The keywords of isend or irecv. The two directions use different groups, so that over NCCL neither
    waits in the other's stream (as Megatron with two stages)."""
    assert group is not None
    rank = dist.get_global_rank(group, source if end == "src" else target)
    return {end: rank, "group": group if source < target else dist.group.WORLD}
