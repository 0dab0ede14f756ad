"""Simulates a schedule with given durations of operations and messages: step time, idle shares, peak activations.

One pass over the operations, so tens of thousands of micro-batches on dozens of stages take seconds. A schedule whose
simulation finishes cannot dead-lock: see program.py for the order of messages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megadpo.pipeline.schedule import BACKWARD, FORWARD, KINDS, REFERENCE, WEIGHTS, Op, Schedule

_PENDING = -1.0


class ScheduleError(Exception):
    """A schedule that cannot be executed: an operation waits for a message that is never sent."""


@dataclass(frozen=True)
class Costs:
    """Durations of operations, in seconds or any other unit.

    Attributes:
        forward, backward, reference: of a micro-batch, or of a half of one, on one chunk; the same on every stage, or one
            for each.
        weights: of a micro-batch's weight gradients, where they are an operation of their own.
        message: from the end of an operation until another stage can use its result.
    """

    forward: float | tuple[float, ...] = 1.0
    backward: float | tuple[float, ...] = 2.0
    reference: float | tuple[float, ...] = 1.0
    weights: float | tuple[float, ...] = 0.0
    message: float = 0.0

    def in_halves(self) -> Costs:
        """The costs of half micro-batches from those of whole ones; both halves cost the same."""
        return replace(self, forward=_half(self.forward), backward=_half(self.backward), reference=_half(self.reference))

    def with_separate_weight_gradients(self) -> Costs:
        """The costs with weight gradients as operations of their own: they cost a forward, which the backward saves."""
        num_stages = max(len(cost) if isinstance(cost, tuple) else 1 for cost in (self.forward, self.backward))
        rest = tuple(self.of(stage, BACKWARD) - self.of(stage, FORWARD) for stage in range(num_stages))
        return replace(self, backward=rest if num_stages > 1 else rest[0], weights=self.forward)

    def of(self, stage: int, kind: str) -> float:
        """The cost of an operation of this kind on a stage."""
        cost = {FORWARD: self.forward, BACKWARD: self.backward, WEIGHTS: self.weights}.get(kind, self.reference)
        return cost[stage] if isinstance(cost, tuple) else cost


def _half(cost: float | tuple[float, ...]) -> float | tuple[float, ...]:
    return tuple(one / 2 for one in cost) if isinstance(cost, tuple) else cost / 2


@dataclass(frozen=True)
class Timing:
    """A schedule with the times at which each operation begins and ends: by stage, in the order of its operations."""

    schedule: Schedule
    starts: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]

    @property
    def seconds(self) -> float:
        """The end of the last operation; the first one begins at 0."""
        return max((ends[-1] for ends in self.ends if ends), default=0.0)

    def idle_shares(self) -> list[float]:
        """Of each stage: the share of the whole time in which it runs no operation."""
        return [1 - sum(ends) / self.seconds + sum(starts) / self.seconds for starts, ends in _pairs(self)]

    @property
    def idle_share(self) -> float:
        """`idle_shares`, mean over the stages."""
        shares = self.idle_shares()
        return sum(shares) / len(shares)

    def entries(self) -> Iterator[tuple[int, Op, float, float]]:
        """(stage, operation, start, end)."""
        for stage, order in enumerate(self.schedule.stages):
            for op, start, end in zip(order, self.starts[stage], self.ends[stage], strict=True):
                yield stage, op, start, end


def _pairs(timing: Timing) -> Iterator[tuple[Sequence[float], Sequence[float]]]:
    return zip(timing.starts, timing.ends, strict=True)


def peak_activations(schedule: Schedule) -> list[int]:
    """Of each stage: the most forwards (micro-batch, chunk and half) whose activations are kept at once, until all of their
    backward is done."""
    last = WEIGHTS if any(op.kind == WEIGHTS for _, op in schedule.ops()) else BACKWARD
    peaks = []
    for order in schedule.stages:
        live = peak = 0
        for op in order:
            live += (op.kind == FORWARD) - (op.kind == last)
            peak = max(peak, live)
        peaks.append(peak)
    return peaks


def simulate(schedule: Schedule, costs: Costs, durations: Sequence[Sequence[float]] | None = None) -> Timing:
    """Every stage runs its operations in their order, each as soon as its input has arrived.

    A reference forward whose source is not in the schedule reads what arrived in the step before.

    Args:
        durations: measured, of each operation of each stage, in place of `costs`.

    Raises:
        ScheduleError: an operation waits for ever, comes before its forward, or reads what no operation gives.
    """
    num_stages = schedule.num_stages
    places, reads, size = _numbered(schedule)
    done = [_PENDING] * size
    if durations is None:
        cost_of = [{kind: costs.of(stage, kind) for kind in KINDS} for stage in range(num_stages)]
        durations = [[cost_of[stage][op.kind] for op in order] for stage, order in enumerate(schedule.stages)]
    starts: list[list[float]] = [[] for _ in range(num_stages)]
    ends: list[list[float]] = [[] for _ in range(num_stages)]
    message = costs.message if num_stages > 1 else 0.0
    waiting, is_waiting = deque(range(num_stages)), [True] * num_stages
    while waiting:
        stage = waiting.popleft()
        is_waiting[stage] = False
        own_starts, own_ends, own_places, own_reads = starts[stage], ends[stage], places[stage], reads[stage]
        first = len(own_ends)
        free = own_ends[-1] if first else 0.0
        for position in range(first, len(own_places)):
            start, source = free, own_reads[position]
            if source >= 0:
                ready = done[source]
                if ready == _PENDING:
                    break
                start = max(free, ready + message)
            own_starts.append(start)
            free = done[own_places[position]] = start + durations[stage][position]
            own_ends.append(free)
        if len(own_ends) > first:
            for other in ((stage + 1) % num_stages, (stage - 1) % num_stages):
                if not is_waiting[other]:
                    is_waiting[other] = True
                    waiting.append(other)
    for stage, order in enumerate(schedule.stages):
        if len(ends[stage]) < len(order):
            raise ScheduleError(f"stage {stage} waits for ever before {order[len(ends[stage])]}")
    return Timing(schedule, tuple(map(tuple, starts)), tuple(map(tuple, ends)))


def _numbered(schedule: Schedule) -> tuple[list[list[int]], list[list[int]], int]:
    """An index for the result of each operation, the index of the result that it reads (-1: of no other stage), and the
    number of indices."""
    num_stages, num_chunks, num_halves = schedule.num_stages, schedule.num_chunks, schedule.num_halves
    span = num_halves * (1 + max((op.micro_batch for order in schedule.stages for op in order), default=0))
    part = num_chunks * span
    size = len(KINDS) * part
    start_of = {kind: number * part for number, kind in enumerate(KINDS)}
    backward, reference = start_of[BACKWARD], start_of[REFERENCE]
    order_of = np.full((num_stages, size), -1)

    def index_of(op: Op) -> int:
        return start_of[op.kind] + op.chunk * span + op.micro_batch * num_halves + op.half

    indices = [np.array([index_of(op) for op in order], np.int64) for order in schedule.stages]
    for stage, own in enumerate(indices):
        order_of[stage, own] = np.arange(len(own))
        if (order_of[stage] >= 0).sum() < len(own):
            raise ScheduleError(f"stage {stage} does an operation twice")
    reads = []
    for stage, own in enumerate(indices):
        backwards = (own >= backward) & (own < backward + part)
        chunk = own % part // span
        source_stage = np.where(backwards, stage + 1, stage - 1)
        source = own + span * ((source_stage == num_stages).astype(int) - (source_stage < 0))
        begins = ((source_stage < 0) & (chunk == 0)) | ((source_stage == num_stages) & (chunk == num_chunks - 1))
        begins |= own >= start_of[WEIGHTS]
        source_stage, source = source_stage % num_stages, np.where(begins, own, source)
        is_made = order_of[source_stage, source] >= 0
        is_ahead = (own >= reference) & (own < reference + part)
        _check(schedule, stage, begins | is_made | is_ahead, "no operation makes what it reads")
        _check_places(schedule, stage, own, order_of[stage], backwards, backwards & begins)
        reads.append(np.where(begins | ~is_made, -1, source_stage * size + source).tolist())
    return [(stage * size + own).tolist() for stage, own in enumerate(indices)], reads, size * num_stages


def _check_places(
    schedule: Schedule, stage: int, own: np.ndarray, order_of: np.ndarray, backwards: np.ndarray, turns: np.ndarray
) -> None:
    """Check that what an operation reads on its own stage comes before it.

    Args:
        own: int64, the index of each of the stage's operations.
        order_of: int64, the position of each index on this stage; -1: not there.
        backwards, turns: bool, which operations are backwards, and which of these begin with the loss.
    """
    part = len(order_of) // len(KINDS)
    place, number = np.arange(len(own)), own % part
    forward, reference = (KINDS.index(kind) * part for kind in (FORWARD, REFERENCE))
    forwards = order_of[np.where(backwards, forward + number, own)]
    _check(schedule, stage, ~backwards | (forwards >= 0) & (forwards < place), "its forward does not come before it")
    weights = own >= KINDS.index(WEIGHTS) * part
    own_backwards = order_of[np.where(weights, KINDS.index(BACKWARD) * part + number, own)]
    _check(
        schedule, stage, ~weights | (own_backwards >= 0) & (own_backwards < place), "its backward does not come before it"
    )
    references = order_of[np.where(turns, reference + number, own)]
    _check(schedule, stage, ~turns | (references < place), "the reference's forward does not come before it")
    if schedule.num_halves == 2:
        is_second = (number % 2 == 0) == backwards
        firsts = order_of[np.where(is_second, own ^ 1, own)]
        may_miss = (own >= reference) & (own < reference + part)  # done in the step before
        is_right = ~is_second | (firsts < place) & ((firsts >= 0) | may_miss)
        _check(schedule, stage, is_right, "the other half does not come before it")


def _check(schedule: Schedule, stage: int, is_right: np.ndarray, otherwise: str) -> None:
    if not is_right.all():
        raise ScheduleError(f"stage {stage} does {schedule.stages[stage][int(np.argmin(is_right))]}, but {otherwise}")
