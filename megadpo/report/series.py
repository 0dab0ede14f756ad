"""What can be said of a noisy curve: means of its parts with their errors, and from which step on it stays beyond a
limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

from megadpo.report.run_files import Curve


def window_of(count: int) -> int:
    """Records that a running mean is taken over: a twentieth of all, at least 10."""
    return max(10, count // 20)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last `window` values up to each."""
    sums = [0.0, *accumulate(values)]
    return [(sums[end] - sums[max(0, end - window)]) / min(end, window) for end in range(1, len(sums))]


def stays_beyond(curve: Curve, is_beyond: Callable[[float], bool], window: int = 1) -> int | None:
    """The first step of the last stretch in which the running mean is beyond the limit, and that lasts to the end; or
    None."""
    means, found = running_mean(curve.values, window), None
    for step, mean in zip(reversed(curve.steps), reversed(means), strict=True):
        if not is_beyond(mean):
            break
        found = step
    return found


def onset(curve: Curve, is_beyond: Callable[[float], bool], window: int = 1) -> int | None:
    """Where a curve that ends beyond a limit went there: as `stays_beyond`; where its running mean came back for a moment,
    the first step beyond."""
    lasting = stays_beyond(curve, is_beyond, window)
    if lasting is not None:
        return lasting
    means = running_mean(curve.values, window)
    return next((step for step, mean in zip(curve.steps, means, strict=True) if is_beyond(mean)), None)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error; that is infinite of a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.inf
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def first_part(values: Sequence[float]) -> Sequence[float]:
    """The first quarter, of at least 10 values where there are so many."""
    return values[: max(10, len(values) // 4)]


def last_part(values: Sequence[float]) -> Sequence[float]:
    """The last quarter, of at least 10 values where there are so many."""
    return values[-max(10, len(values) // 4) :]


def median(values: Sequence[float]) -> float:
    """The middle value."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def together(one: Curve, other: Curve, combine: Callable[[float, float], float]) -> Curve:
    """Two curves combined at the steps that both have."""
    of_other = dict(zip(other.steps, other.values, strict=True))
    shared = [(step, value) for step, value in zip(one.steps, one.values, strict=True) if step in of_other]
    return Curve([step for step, _ in shared], [combine(value, of_other[step]) for step, value in shared])
