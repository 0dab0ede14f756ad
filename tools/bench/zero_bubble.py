"""Would a zero-bubble schedule pay? Simulated idle shares: ``python -m tools.bench.zero_bubble``; nothing is trained.

ZB-H1 (arXiv:2401.10241) cuts a backward into the gradient of the input, which the stage before waits for, and that of the
weights, which nobody waits for, and keeps no more activations than 1F1B's first stage. It is played through here with a
forward, either part of a backward and a reference forward at 1 each, beside what `schedule` can do already. A stage that
waits for nothing has an idle share of 0, so the interleaved reference's steady idle share is the most that any schedule
could still gain.
"""

from __future__ import annotations

from megadpo.pipeline.fill import with_reference
from megadpo.pipeline.schedule import one_forward_one_backward
from megadpo.pipeline.simulate import Costs, simulate
from tools.bench.common import print_table

SIZES = ((2, 4), (2, 8), (2, 16), (4, 8), (4, 16), (4, 32), (8, 32), (16, 64))
MESSAGE = 0.02


def main() -> None:
    columns = ["stages", "micro-batches", "1F1B", "in halves", "zero-bubble", "interleaved reference, steady"]
    print_table("Idle share of a step without and with a reference", columns, [_row(*size) for size in SIZES])


def _row(stages: int, count: int) -> list[float]:
    whole, costs = Costs(message=MESSAGE), Costs(message=MESSAGE).in_halves()
    alone = simulate(one_forward_one_backward(stages, count), whole).idle_share
    halves = simulate(one_forward_one_backward(stages, count, num_halves=2), costs).idle_share
    zero_bubble = 1 - 3 * count / zero_bubble_seconds(stages, count, MESSAGE)
    done = None
    for _ in range(3):
        schedule, done = with_reference(stages, count, 1, done, count, whole)
    return [stages, count, alone, halves, zero_bubble, simulate(schedule, whole).idle_share]


def zero_bubble_order(num_stages: int, count: int, stage: int) -> list[tuple[str, int]]:
    """1F1B's order of forwards and backwards; stage s does its weights' gradients s micro-batches later, so that what
    other stages wait for goes first. No stage keeps more than 1F1B's first one, `num_stages` micro-batches."""
    lead = min(num_stages - 1 - stage, count)
    order = [("forward", number) for number in range(lead)]
    for number in range(count):
        order += [("forward", number + lead)] if number + lead < count else []
        order.append(("backward", number))
        order += [("weights", number - stage)] if number >= stage else []
    return order + [("weights", number) for number in range(max(count - stage, 0), count)]


def zero_bubble_seconds(num_stages: int, count: int, message: float = 0.0) -> float:
    """How long ZB-H1 takes with operations of 1."""
    orders = [zero_bubble_order(num_stages, count, stage) for stage in range(num_stages)]
    at, free = [0] * num_stages, [0.0] * num_stages
    done: dict[tuple[str, int, int], float] = {}
    while any(place < len(order) for place, order in zip(at, orders, strict=True)):
        for stage, order in enumerate(orders):
            while at[stage] < len(order):
                kind, number = order[at[stage]]
                source = stage + {"forward": -1, "backward": 1, "weights": 0}[kind]
                ready = free[stage]
                if source != stage and 0 <= source < num_stages:
                    if (kind, source, number) not in done:
                        break
                    ready = max(ready, done[kind, source, number] + message)
                free[stage] = done[kind, stage, number] = ready + 1
                at[stage] += 1
    return max(free)


if __name__ == "__main__":
    main()
