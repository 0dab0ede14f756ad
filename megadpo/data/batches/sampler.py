"""The sampler: which groups a step sees, a pure function of (seed, step), so that resuming needs no state.

With `data.step_tokens_multiple_of`, groups of nearby steps are exchanged (`compose_steps`): then it is a function of that
number and of the groups' lengths too, but never of the layout.

Sample s of a run is in epoch s // samples_per_epoch, at position s % samples_per_epoch of that epoch's order. A step may end
one epoch and begin the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megadpo.data.batches.compose import STEPS_AT_ONCE, compose_steps

IntArray = npt.NDArray[np.int64]

# The purpose of a random stream: part of its seed, so that no two purposes share random numbers.
_ORDER, _SUBSET = 0, 1


def samples_per_epoch(sources: int | npt.ArrayLike, weights: Sequence[float] | npt.ArrayLike = (1.0,)) -> int:
    """Number of groups an epoch sees: a source's rows times its weight, rounded to a whole group.

    Args:
        sources: the number of groups (of one source), or int [G]: each group's source number.
        weights: float [num_sources], how many times an epoch sees each group of a source.
    """
    members = _members(sources, weights)
    return sum(_num_samples(len(group_ids), weight) for group_ids, weight in members)


def num_steps(num_samples_an_epoch: int, pairs_per_step: int, epochs: float) -> int:
    """Steps of a run of `epochs` epochs; the last one may be smaller."""
    return -(-num_samples(num_samples_an_epoch, epochs) // pairs_per_step)


def num_samples(num_samples_an_epoch: int, epochs: float) -> int:
    """Groups seen in `epochs` epochs, at least one."""
    return max(round(num_samples_an_epoch * epochs), 1)


def step_batch(
    sources: int | npt.ArrayLike,
    weights: Sequence[float] | npt.ArrayLike,
    step: int,
    pairs_per_step: int,
    seed: int,
    shuffle: bool = True,
    epochs: float | None = None,
) -> IntArray:
    """The groups of one step; `StepSampler` for many.

    Args:
        sources: the number of groups (of one source), or int [G]: each group's source number.
        weights: float [num_sources], how many times an epoch sees each group of a source; of a fractional part it sees
            another window of the source's groups every epoch, so that all are seen equally often over many epochs.
        step: from 0.
        pairs_per_step: groups of a full step.
        seed: of the run.
        shuffle: False keeps the order of the sources in every epoch.
        epochs: where a run of so many epochs ends; its last step is smaller, later ones are empty. None: it never ends.

    Returns:
        int64 [at most pairs_per_step]: group ids (positions in the store).
    """
    return StepSampler(sources, weights, pairs_per_step, seed, shuffle, epochs).group_ids(step)


class StepSampler:
    """The groups of every step of a run. Caches the current epoch's order; has no other state.

    Attributes:
        samples_per_epoch: groups an epoch sees.
        num_steps: of a run of `epochs` epochs; None where it has no end.
    """

    def __init__(
        self,
        sources: int | npt.ArrayLike,
        weights: Sequence[float] | npt.ArrayLike,
        pairs_per_step: int,
        seed: int,
        shuffle: bool = True,
        epochs: float | None = None,
        lengths_G: IntArray | None = None,
        tokens_multiple_of: int | None = None,
    ) -> None:
        """Arguments as those of `step_batch`.

        Args:
            lengths_G: int64, tokens of each group; read only with `tokens_multiple_of`.
            tokens_multiple_of: groups are exchanged until a step's tokens come close to a multiple of it; None: never.
        """
        assert pairs_per_step >= 1 and (tokens_multiple_of is None or lengths_G is not None)
        self._data = (sources, weights)
        self._seed, self._shuffle = seed, shuffle
        self._pairs_per_step = pairs_per_step
        self.samples_per_epoch = samples_per_epoch(sources, weights)
        assert self.samples_per_epoch > 0
        self._num_samples = None if epochs is None else num_samples(self.samples_per_epoch, epochs)
        self.num_steps = None if epochs is None else num_steps(self.samples_per_epoch, pairs_per_step, epochs)
        self._order: tuple[int, IntArray] | None = None
        self._lengths_G, self._multiple_of = lengths_G, tokens_multiple_of
        self._stretch: tuple[tuple[int, int], IntArray] | None = None

    def group_ids(self, step: int) -> IntArray:
        """int64 [at most pairs_per_step]: the groups of a step."""
        assert step >= 0
        sample, end = step * self._pairs_per_step, (step + 1) * self._pairs_per_step
        if self._num_samples is not None:
            end = min(end, self._num_samples)
        parts = [np.zeros(0, np.int64)]
        while sample < end:
            epoch, position = divmod(sample, self.samples_per_epoch)
            part = self._groups_at(epoch, position)[: end - sample]
            parts.append(part)
            sample += len(part)
        return np.concatenate(parts)

    def _groups_at(self, epoch: int, position: int) -> IntArray:
        """The groups of an epoch from `position` to the end of that step or epoch: at most pairs_per_step."""
        size = self._pairs_per_step
        first = -epoch * self.samples_per_epoch % size  # ends the step that the previous epoch began
        number, within = divmod(position - first, size)
        if self._multiple_of is None or within or position + size > self.samples_per_epoch:
            return self._order_of(epoch)[position : position + (size if position >= first else first)]
        stretch, number = divmod(number, STEPS_AT_ONCE)
        return self._stretch_of(epoch, stretch)[number]

    def _stretch_of(self, epoch: int, stretch: int) -> IntArray:
        """int64 [steps, pairs_per_step]: the groups of whole steps of an epoch that are composed together."""
        if self._stretch is None or self._stretch[0] != (epoch, stretch):
            assert self._multiple_of is not None and self._lengths_G is not None
            size = self._pairs_per_step
            first = -epoch * self.samples_per_epoch % size
            num_steps = min((self.samples_per_epoch - first) // size - stretch * STEPS_AT_ONCE, STEPS_AT_ONCE)
            start = first + stretch * STEPS_AT_ONCE * size
            groups_N = self._order_of(epoch)[start : start + num_steps * size]
            positions = compose_steps(self._lengths_G[groups_N], num_steps, self._multiple_of)
            self._stretch = ((epoch, stretch), groups_N[positions])
        return self._stretch[1]

    def _order_of(self, epoch: int) -> IntArray:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, epoch_order(*self._data, epoch, self._seed, self._shuffle))
        return self._order[1]


def epoch_order(
    sources: int | npt.ArrayLike, weights: Sequence[float] | npt.ArrayLike, epoch: int, seed: int, shuffle: bool = True
) -> IntArray:
    """int64 [samples_per_epoch]: an epoch's group ids in the order they are seen. Pure."""
    parts = []
    for number, (group_ids, weight) in enumerate(_members(sources, weights)):
        whole, extra = divmod(_num_samples(len(group_ids), weight), max(len(group_ids), 1))
        parts += [group_ids] * whole
        if extra:
            # A window that moves by its own length every epoch: no group twice in an epoch, all equally often over many.
            window = (np.arange(extra) + epoch * extra) % len(group_ids)
            chosen = _permutation(len(group_ids), seed, _SUBSET, number) if shuffle else np.arange(len(group_ids))
            parts.append(group_ids[np.sort(chosen[window])])
    order = np.concatenate(parts)
    return order[_permutation(len(order), seed, _ORDER, epoch)] if shuffle else order


def _members(sources: int | npt.ArrayLike, weights: Sequence[float] | npt.ArrayLike) -> list[tuple[IntArray, float]]:
    """Each source's group ids, ascending, and its weight."""
    weights_list = [float(weight) for weight in np.asarray(weights, np.float64)]
    if isinstance(sources, int | np.integer):
        assert len(weights_list) == 1
        return [(np.arange(int(sources)), weights_list[0])]
    sources_G = np.asarray(sources)
    return [(np.flatnonzero(sources_G == number), weight) for number, weight in enumerate(weights_list)]


def _num_samples(num_rows: int, weight: float) -> int:
    """Rounded half up; at least one sample of a source that has a row."""
    return max(math.floor(num_rows * weight + 0.5), 1) if num_rows else 0


def _permutation(count: int, seed: int, purpose: int, number: int) -> IntArray:
    """The order of `count` random 64-bit numbers: unlike Generator.permutation, the same in every version of numpy."""
    bits = np.random.Philox(np.random.SeedSequence([seed, purpose, number])).random_raw(count)
    return np.argsort(bits, kind="stable")
