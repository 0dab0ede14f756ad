"""Length-aware batching: exchanges groups between nearby steps, so that steps fill their micro-batches. Pure.

Every step keeps its number of groups, and its tokens come just below a multiple of `multiple_of` (packing inside the step
needs a little room). Groups are assigned longest first, each to the step with the most missing tokens per missing group:
every step ends within a few tokens of its target, with long and short groups alike.
"""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

STEPS_AT_ONCE = 64
"""Number of consecutive steps that exchange groups: a group moves by less than this many steps."""

FILL = 0.996
"""The share of a multiple that a step fills: packing whole groups into micro-batches needs some spare room."""


def compose_steps(lengths_N: IntArray, num_steps: int, multiple_of: int) -> IntArray:
    """Assign N groups to steps of N / num_steps groups each.

    Args:
        lengths_N: int64, tokens of each group, in the order of the epoch; N is a multiple of `num_steps`.
        multiple_of: what a step's tokens should be a multiple of; at most the mean of a step's tokens.

    Returns:
        int64 [num_steps, N / num_steps]: the positions of each step's groups among the N, ascending.
    """
    size, rest = divmod(len(lengths_N), num_steps)
    assert not rest and size
    total = int(lengths_N.sum())
    num_multiples = max(-int(-total // (FILL * multiple_of)), 1)
    ends = np.arange(num_steps + 1) * num_multiples // num_steps
    targets = np.diff(ends) * (total / num_multiples)
    if (targets == 0).any():  # short groups: fewer multiples than steps
        targets = np.full(num_steps, total / num_steps)
    steps: list[list[int]] = [[] for _ in range(num_steps)]
    missing = targets.tolist()
    most_missing = [(-target / size, step) for step, target in enumerate(missing)]
    heapq.heapify(most_missing)
    lengths = lengths_N.tolist()
    for position in np.argsort(-lengths_N, kind="stable").tolist():
        step = most_missing[0][1]
        steps[step].append(position)
        missing[step] -= lengths[position]
        room = size - len(steps[step])
        if room:
            heapq.heapreplace(most_missing, (-missing[step] / room, step))
        else:
            heapq.heappop(most_missing)
    return np.sort(np.array(steps, np.int64), axis=1)
