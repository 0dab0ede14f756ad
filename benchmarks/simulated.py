"""Simulated idle shares: what fills the bubbles of a pipeline (nothing is trained).

With a resident reference in a run of 8 steps: before 1F1B, and interleaved with it. Then without a reference (or with one
that is precomputed): 1F1B, 1F1B in halves (`schedule.split_pairs`, if both halves cost the same), and ZB-H1
(arXiv:2401.10241; `schedule.zero_bubble`); and both with an interleaved reference in the third step of a run. Forwards,
either part of a backward and reference forwards cost 1 each, a message that somebody waits for 0.02.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.common import print_table
from megadpo.pipeline.fill import Progress, rough_costs, with_reference, with_reference_before
from megadpo.pipeline.schedule import Schedule, one_forward_one_backward, zero_bubble
from megadpo.pipeline.simulate import Costs, Timing, simulate

SIZES = ((2, 4), (2, 8), (2, 16), (4, 8), (4, 16), (4, 32), (8, 32), (16, 64))
NUM_STEPS = 8


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    report["reference"] = [reference_row(*size) for size in SIZES]
    report["filled"] = [row(*size) for size in SIZES]
    columns = ["stages", "micro-batches", "reference before 1F1B", "interleaved, steady", "ratio", "interleaved, all steps"]
    print_table(f"Idle share of {NUM_STEPS} steps with a resident reference", [*columns, "ratio"], report["reference"])
    columns = ["stages", "micro-batches", "1F1B", "in halves", "zero-bubble", "1F1B + reference", "zero-bubble + reference"]
    print_table("Idle share of a step without and with a reference", columns, report["filled"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def reference_row(stages: int, count: int) -> list[float]:
    """A line of the first table."""
    policy, costs = one_forward_one_backward(stages, count), rough_costs()
    before = simulate(with_reference_before(policy), costs).idle_share
    steps = _interleaved(policy, costs)
    steady, all_steps = _idle_share(steps[1:-1]), _idle_share(steps)
    return [stages, count, before, steady, steady / before, all_steps, all_steps / before]


def row(stages: int, count: int) -> list[float]:
    """A line of the second table."""
    whole, apart = rough_costs(), rough_costs(is_zero_bubble=True)
    policy, in_parts = one_forward_one_backward(stages, count), zero_bubble(stages, count)
    halves = one_forward_one_backward(stages, count, num_halves=2)
    alone = [(policy, whole), (halves, whole.in_halves()), (in_parts, apart)]
    shares = [simulate(schedule, costs).idle_share for schedule, costs in alone]
    beside = [_interleaved(schedule, costs)[2].idle_share for schedule, costs in ((policy, whole), (in_parts, apart))]
    return [stages, count, *shares, *beside]


def _interleaved(policy: Schedule, costs: Costs) -> list[Timing]:
    """The first step does the reference of two steps, and the last of none."""
    done: Progress | None = None
    steps = []
    for number in range(NUM_STEPS):
        num_ahead = policy.num_micro_batches if number < NUM_STEPS - 1 else 0
        schedule, done = with_reference(policy, done, num_ahead, costs)
        steps.append(simulate(schedule, costs))
    return steps


def _idle_share(steps: list[Timing]) -> float:
    """Of the steps' whole time."""
    return sum(step.idle_share * step.seconds for step in steps) / sum(step.seconds for step in steps)
