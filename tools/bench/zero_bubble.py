"""What fills the bubbles of a pipeline? Simulated idle shares: ``python -m tools.bench.zero_bubble``; nothing is trained.

Without a reference (or with one that is precomputed): 1F1B, 1F1B in halves (`schedule.split_pairs`, if both halves cost the
same), and ZB-H1 (arXiv:2401.10241; `schedule.zero_bubble`). With a resident reference interleaved: 1F1B and ZB-H1 in the
third step of a run. Forwards, either part of a backward and reference forwards cost 1 each.
"""

from __future__ import annotations

from megadpo.pipeline.fill import proportions, with_reference
from megadpo.pipeline.schedule import Schedule, one_forward_one_backward, zero_bubble
from megadpo.pipeline.simulate import Costs, simulate
from tools.bench.common import print_table

SIZES = ((2, 4), (2, 8), (2, 16), (4, 8), (4, 16), (4, 32), (8, 32), (16, 64))


def main() -> None:
    columns = ["stages", "micro-batches", "1F1B", "in halves", "zero-bubble", "1F1B + reference", "zero-bubble + reference"]
    print_table("Idle share of a step without and with a reference", columns, [_row(*size) for size in SIZES])


def _row(stages: int, count: int) -> list[float]:
    whole, apart = proportions(), proportions(is_zero_bubble=True)
    policy, in_parts = one_forward_one_backward(stages, count), zero_bubble(stages, count)
    halves = one_forward_one_backward(stages, count, num_halves=2)
    alone = [(policy, whole), (halves, whole.in_halves()), (in_parts, apart)]
    shares = [simulate(schedule, costs).idle_share for schedule, costs in alone]
    return [stages, count, *shares, _beside_reference(policy, whole), _beside_reference(in_parts, apart)]


def _beside_reference(policy: Schedule, costs: Costs) -> float:
    done = None
    for _ in range(3):
        schedule, done = with_reference(policy, done, policy.num_micro_batches, costs)
    return simulate(schedule, costs).idle_share


if __name__ == "__main__":
    main()
