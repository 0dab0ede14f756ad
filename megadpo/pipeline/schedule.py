"""A pipeline schedule as plain data: for each stage, its operations in order.

Everything here is a pure function of a few sizes, so all ranks make the same schedule without communicating. simulate.py
computes when each operation runs, program.py adds the messages, and executor.py executes the result.

Chunk c of stage s is the model's part number c x stages + s, as everywhere.

A micro-batch of pairs may travel as two halves: half 0 has the prompts and the chosen answers, half 1 the rejected ones. On
every stage half 0 goes forward first, since half 1 reads its prompts' keys, and backward last, since half 1's backward
adds to these keys' gradients. The loss is computed on the last stage before half 1's backward.

The weight gradients of a backward, which no other stage waits for, may be an operation of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

FORWARD, BACKWARD, REFERENCE, AHEAD, WEIGHTS = "forward", "backward", "reference", "ahead", "weights"
"""Kinds of operations: the policy's forward and backward; the reference's forward of a micro-batch of this step, and of the
next step; and a micro-batch's weight gradients, where its backward has delayed them."""
KINDS = (FORWARD, BACKWARD, REFERENCE, AHEAD, WEIGHTS)


class Op(NamedTuple):
    """One operation of a stage.

    Attributes:
        kind: one of KINDS.
        micro_batch: its number in its step.
        chunk: which of the stage's chunks.
        half: which half of the micro-batch; 0 where micro-batches travel whole.
    """

    kind: str
    micro_batch: int
    chunk: int = 0
    half: int = 0


Order = tuple[Op, ...]
"""The operations of one stage, in order."""


@dataclass(frozen=True)
class Schedule:
    """The operations of every stage.

    Attributes:
        stages: the order of each stage.
        num_chunks: chunks of each stage.
        num_halves: 2 where micro-batches travel in halves, else 1.
    """

    stages: tuple[Order, ...]
    num_chunks: int = 1
    num_halves: int = 1

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return len(self.stages)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of the step."""
        return 1 + max((op.micro_batch for op in self.stages[0] if op.kind != AHEAD), default=-1)

    def ops(self) -> Iterator[tuple[int, Op]]:
        """Every (stage, operation)."""
        return ((stage, op) for stage, order in enumerate(self.stages) for op in order)


def source_of(stage: int, op: Op, num_stages: int, num_chunks: int) -> tuple[int, Op] | None:
    """The (stage, operation) whose result `op` on `stage` reads; None: it reads the batch, or the loss's gradient."""
    if op.kind == WEIGHTS:
        return None
    if op.kind != BACKWARD:
        if stage > 0:
            return stage - 1, op
        return (num_stages - 1, op._replace(chunk=op.chunk - 1)) if op.chunk > 0 else None
    if stage < num_stages - 1:
        return stage + 1, op
    return (0, op._replace(chunk=op.chunk + 1)) if op.chunk < num_chunks - 1 else None


def target_of(stage: int, op: Op, num_stages: int, num_chunks: int) -> tuple[int, Op] | None:
    """The (stage, operation) that reads the result of `op` on `stage`; None: there is none."""
    if op.kind == WEIGHTS:
        return None
    if op.kind == BACKWARD:
        if stage > 0:
            return stage - 1, op
        return (num_stages - 1, op._replace(chunk=op.chunk - 1)) if op.chunk > 0 else None
    if stage < num_stages - 1:
        return stage + 1, op
    return (0, op._replace(chunk=op.chunk + 1)) if op.chunk < num_chunks - 1 else None


def all_forwards(
    num_stages: int, num_micro_batches: int, num_chunks: int = 1, kind: str = FORWARD, num_halves: int = 1
) -> Schedule:
    """A forward of every micro-batch through all chunks, without a backward; with several chunks in rounds of as many
    micro-batches as there are stages."""
    rounds = _rounds(num_stages, num_micro_batches, num_chunks)
    order = tuple(Op(kind, *entry, half) for entry in rounds for half in range(num_halves))
    return Schedule((order,) * num_stages, num_chunks, num_halves)


def one_forward_one_backward(num_stages: int, num_micro_batches: int, num_chunks: int = 1, num_halves: int = 1) -> Schedule:
    """1F1B (arXiv:2006.15704), interleaved over the chunks (arXiv:2104.04473): the order of Megatron's schedules.

    A stage runs forwards until its first backward can arrive, then one forward and one backward in turns. With halves, the
    first backward is that of a half 1, which has one more forward before it.
    """
    assert num_halves == 1 or num_chunks == 1, "several chunks take turns by whole micro-batches"
    rounds, halves = _rounds(num_stages, num_micro_batches, num_chunks), range(num_halves)
    forwards = [Op(FORWARD, micro_batch, chunk, half) for micro_batch, chunk in rounds for half in halves]
    backwards = [
        Op(BACKWARD, micro_batch, num_chunks - 1 - chunk, half) for micro_batch, chunk in rounds for half in reversed(halves)
    ]
    stages = []
    for stage in range(num_stages):
        lead = num_stages - 1 - stage
        if num_chunks > 1:
            lead = 2 * lead + (num_chunks - 1) * num_stages
        lead = min(lead + num_halves - 1, len(forwards))
        turns = (op for pair in zip(forwards[lead:], backwards, strict=False) for op in pair)
        stages.append((*forwards[:lead], *turns, *backwards[len(forwards) - lead :]))
    return Schedule(tuple(stages), num_chunks, num_halves)


def zero_bubble(num_stages: int, num_micro_batches: int) -> Schedule:
    """ZB-H1 (arXiv:2401.10241): 1F1B whose weight gradients are operations of their own.

    Stage s delays them by s micro-batches, so that what other stages wait for runs first and they fill its last bubbles. No
    stage keeps the activations of more than `num_stages` micro-batches, as 1F1B's first stage.
    """
    stages = []
    for stage, order in enumerate(one_forward_one_backward(num_stages, num_micro_batches).stages):
        later = [Op(WEIGHTS, number) for number in range(num_micro_batches)]
        mixed: list[Op] = []
        for op in order:
            mixed.append(op)
            if op.kind == BACKWARD and op.micro_batch >= stage:
                mixed.append(later.pop(0))
        stages.append((*mixed, *later))
    return Schedule(tuple(stages))


def _rounds(num_stages: int, num_micro_batches: int, num_chunks: int) -> list[tuple[int, int]]:
    """(micro-batch, chunk) in the order of interleaved schedules: a round of micro-batches through one chunk, then
    through the next one."""
    round_of = num_stages if num_chunks > 1 else max(num_micro_batches, 1)
    return [
        (micro_batch, chunk)
        for start in range(0, num_micro_batches, round_of)
        for chunk in range(num_chunks)
        for micro_batch in range(start, min(start + round_of, num_micro_batches))
    ]
