"""Which groups of a stretch of the data's order go into which of its steps, so that steps fill micro-batches. Pure.

Every step gets exactly as many groups, and as many tokens as a whole number of `multiple_of` holds, less a little that
the packing inside a step needs. Groups are dealt longest first, each to the step that has the most tokens to go for each
group to go: every step ends within a few tokens of its target, with long and short groups alike.
"""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

STEPS_AT_ONCE = 64
"""Steps that are composed together: a group moves by less than this many."""

FILL = 0.996
"""Of the multiple: packing whole groups into micro-batches needs some room to spare."""


def compose(lengths_N: IntArray, num_steps: int, multiple_of: int) -> IntArray:
    """int64 [num_steps, N / num_steps]: the places of each step's groups among the N, ascending.

    Args:
        lengths_N: int64, tokens of each group, in the order they would be seen.
        multiple_of: what a step's tokens are to fill; no more than the mean step's tokens.
    """
    size, rest = divmod(len(lengths_N), num_steps)
    assert not rest and size
    total = int(lengths_N.sum())
    num_multiples = max(-int(-total // (FILL * multiple_of)), 1)
    ends = np.arange(num_steps + 1) * num_multiples // num_steps
    targets = np.diff(ends) * (total / num_multiples)
    if (targets == 0).any():  # a stretch of short groups has fewer multiples than steps
        targets = np.full(num_steps, total / num_steps)
    steps: list[list[int]] = [[] for _ in range(num_steps)]
    to_go = targets.tolist()
    wanting = [(-target / size, step) for step, target in enumerate(to_go)]
    heapq.heapify(wanting)
    lengths = lengths_N.tolist()
    for place in np.argsort(-lengths_N, kind="stable").tolist():
        step = wanting[0][1]
        steps[step].append(place)
        to_go[step] -= lengths[place]
        room = size - len(steps[step])
        if room:
            heapq.heapreplace(wanting, (-to_go[step] / room, step))
        else:
            heapq.heappop(wanting)
    return np.sort(np.array(steps, np.int64), axis=1)
