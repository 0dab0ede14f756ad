"""The schedule of a whole step: the policy's operations, and a resident reference's forwards before them or in the
pipeline's bubbles (interleaved).

Within one step interleaving gains nothing: the last stage cannot begin before a micro-batch has come through all stages,
nor can it be the last to end. But the reference of the *next* step's micro-batches does not depend on this step's update.
So a step begins with those reference forwards of its own that the step before has not done (the last stages run them while
they wait for the policy's first forwards), and fills its bubbles with the next step's (the first stages while they wait for
the first backward, the last ones while the last backwards go back). The stages end a step at different points in the next
step's forwards, each further than the one after it, and that step begins there. Where the reference is updated between two
steps, nothing is run ahead.

A reference forward keeps no activations, so the peak memory stays that of the policy alone.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Sequence
from dataclasses import replace

from megadpo.pipeline.schedule import (
    AHEAD,
    REFERENCE,
    Op,
    Schedule,
    all_forwards,
    one_forward_one_backward,
    source_of,
    target_of,
    zero_bubble,
)
from megadpo.pipeline.simulate import Costs, simulate

Progress = tuple[int, ...]
"""Of each stage: how many of a step's reference forwards it has done, in the order of `schedule.all_forwards`."""

MESSAGE_COST = 0.02
"""The time of a message between two stages, in forwards of a mean chunk."""


def rough_costs(recomputes: bool = False, is_zero_bubble: bool = False) -> Costs:
    """Estimated durations, in forwards; the same on all ranks, so that all of them make the same schedule.

    Args:
        recomputes: whether a backward runs its forward again (full activation recomputation).
        is_zero_bubble: whether weight gradients are operations of their own.
    """
    costs = Costs(backward=3.0 if recomputes else 2.0, message=MESSAGE_COST)
    return costs.with_separate_weight_gradients() if is_zero_bubble else costs


@functools.lru_cache(maxsize=64)
def policy_schedule(
    num_stages: int, num_micro_batches: int, num_chunks: int = 1, num_halves: int = 1, is_zero_bubble: bool = False
) -> Schedule:
    """The policy's operations: 1F1B, or `schedule.zero_bubble` of whole micro-batches. Cached for each size of a step."""
    if is_zero_bubble:
        assert num_chunks == num_halves == 1, "whole micro-batches through one chunk a stage"
        return zero_bubble(num_stages, num_micro_batches)
    return one_forward_one_backward(num_stages, num_micro_batches, num_chunks, num_halves)


def with_reference_before(policy: Schedule) -> Schedule:
    """All of the reference's forwards, then the policy's operations."""
    sizes = policy.num_stages, policy.num_micro_batches, policy.num_chunks
    pairs = zip(all_forwards(*sizes, REFERENCE, policy.num_halves).stages, policy.stages, strict=True)
    return replace(policy, stages=tuple(first + then for first, then in pairs))


@functools.lru_cache(maxsize=64)
def with_reference(
    policy: Schedule, done: Progress | None = None, num_ahead: int = 0, costs: Costs | None = None
) -> tuple[Schedule, Progress]:
    """The policy's operations, interleaved with this step's reference forwards that are not `done` and with some of the next
    step's.

    Args:
        done: how many of this step's reference forwards each stage has done already; None: none.
        num_ahead: micro-batches of the next step; 0: nothing is run ahead.
        costs: estimated durations; None: `Costs()`.

    Returns:
        The schedule, and how many of the next step's reference forwards each stage has done after it.
    """
    costs, num_stages = costs or Costs(), policy.num_stages
    own = all_forwards(num_stages, policy.num_micro_batches, policy.num_chunks, REFERENCE, policy.num_halves)
    ahead = all_forwards(num_stages, num_ahead, policy.num_chunks, AHEAD, policy.num_halves)
    left = [order[start:] for order, start in zip(own.stages, done or (0,) * num_stages, strict=True)]
    timing = simulate(policy, costs)
    gaps = timing.ends[0][-1] - sum(costs.of(0, op.kind) for op in policy.stages[0]) if policy.stages[0] else 0.0
    lead = max(0, len(ahead.stages[0]) - math.floor(gaps / costs.of(0, REFERENCE) + 1e-6))
    filler = _Filler(policy, left, [len(left[0]) + lead, *map(len, left[1:])], ahead.stages, costs)
    stages = filler.run()
    progress = tuple(sum(op.kind == AHEAD for op in order) for order in stages)
    return replace(policy, stages=tuple(stages)), progress


class _Filler:
    """Simulates the pipeline event by event: a stage that is free runs its next policy operation if its input has arrived,
    else its next reference forward if that one's has."""

    def __init__(
        self,
        policy: Schedule,
        left: Sequence[Sequence[Op]],
        leads: Sequence[int],
        ahead: Sequence[Sequence[Op]],
        costs: Costs,
    ) -> None:
        """`leads`: how many reference forwards each stage runs before its first policy operation."""
        self.policy, self.leads, self.costs = policy, leads, costs
        self.references = [[*first, *then] for first, then in zip(left, ahead, strict=True)]
        self.is_left = [frozenset(ops) for ops in left]
        num_stages = policy.num_stages
        self.next_policy, self.next_reference = [0] * num_stages, [0] * num_stages
        self.free = [0.0] * num_stages
        self.arrivals: list[dict[Op, float]] = [{} for _ in range(num_stages)]
        self.orders: list[list[tuple[Op, float]]] = [[] for _ in range(num_stages)]
        self.events = [(0.0, stage) for stage in range(num_stages)]

    def run(self) -> list[tuple[Op, ...]]:
        """The order of each stage, up to the end of the first stage's and of all policy operations."""
        while self.events:
            now, stage = heapq.heappop(self.events)
            if now >= self.free[stage]:
                op = self._choose(stage, now)
                if op is not None:
                    self._do(stage, op, now)
        policy_ends = [end for order in self.orders for op, end in order if op.kind != AHEAD]
        end_of_step = max([*policy_ends, *(end for _, end in self.orders[0][-1:])], default=0.0)
        return [
            tuple(op for op, end in order if op.kind != AHEAD or end <= end_of_step * (1 + 1e-9)) for order in self.orders
        ]

    def _choose(self, stage: int, now: float) -> Op | None:
        policy, references = self.policy.stages[stage], self.references[stage]
        wanted = policy[self.next_policy[stage]] if self.next_policy[stage] < len(policy) else None
        reference = references[self.next_reference[stage]] if self.next_reference[stage] < len(references) else None
        if self.next_reference[stage] >= self.leads[stage] and wanted is not None:
            ready = self._ready(stage, wanted)
            if ready <= now:
                return wanted
            if reference is not None and now + self.costs.of(stage, REFERENCE) / 2 > ready:
                # The policy's operation is on its way and would have to wait for longer than the stage does now.
                heapq.heappush(self.events, (ready, stage))
                return None
        return reference if reference is not None and self._ready(stage, reference) <= now else None

    def _ready(self, stage: int, op: Op) -> float:
        source = source_of(stage, op, self.policy.num_stages, self.policy.num_chunks)
        if source is None:
            return 0.0
        if op.kind == REFERENCE and source[1] not in self.is_left[source[0]]:
            return 0.0
        return self.arrivals[stage].get(op, math.inf)

    def _do(self, stage: int, op: Op, now: float) -> None:
        end = self.free[stage] = now + self.costs.of(stage, op.kind)
        if op.kind in (REFERENCE, AHEAD):
            self.next_reference[stage] += 1
        else:
            self.next_policy[stage] += 1
        self.orders[stage].append((op, end))
        heapq.heappush(self.events, (end, stage))
        target = target_of(stage, op, self.policy.num_stages, self.policy.num_chunks)
        if target is not None:
            arrival = end + (self.costs.message if target[0] != stage else 0.0)
            self.arrivals[target[0]][target[1]] = arrival
            heapq.heappush(self.events, (arrival, target[0]))
