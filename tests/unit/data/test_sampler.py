"""Batches are a pure function of (seed, step): nothing is skipped or seen twice, wherever a run starts."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megadpo.data.batches.sampler import StepSampler, epoch_order, num_steps, samples_per_epoch, step_batch

sizes = st.integers(1, 40)
steps = st.integers(1, 17)
seeds = st.integers(0, 2**32)


@settings(deadline=None)
@given(sizes, steps, seeds, st.booleans(), st.integers(1, 4))
def test_batches_put_end_to_end_are_whole_epochs_each_a_permutation(
    num_groups: int, pairs_per_step: int, seed: int, shuffle: bool, epochs: int
) -> None:
    count = num_steps(samples_per_epoch(num_groups), pairs_per_step, epochs)
    batches = [step_batch(num_groups, [1.0], s, pairs_per_step, seed, shuffle, epochs) for s in range(count)]
    assert all(len(batch) == pairs_per_step for batch in batches[:-1]) and len(batches[-1]) > 0
    seen = np.concatenate(batches)
    assert len(seen) == epochs * num_groups
    for epoch in seen.reshape(epochs, num_groups):
        assert sorted(epoch.tolist()) == list(range(num_groups))
        assert shuffle or epoch.tolist() == list(range(num_groups))
    assert len(step_batch(num_groups, [1.0], count, pairs_per_step, seed, shuffle, epochs)) == 0


@settings(deadline=None)
@given(sizes, steps, seeds, st.lists(st.integers(0, 30), max_size=5))
def test_a_batch_does_not_depend_on_the_steps_before_it(
    num_groups: int, pairs_per_step: int, seed: int, others: list[int]
) -> None:
    batches = StepSampler(num_groups, [1.0], pairs_per_step, seed)
    for step in [*others, 7]:
        assert np.array_equal(batches.group_ids(step), step_batch(num_groups, [1.0], step, pairs_per_step, seed))


@settings(deadline=None)
@given(sizes, seeds, steps, steps)
def test_the_order_of_the_samples_does_not_depend_on_the_step_size(num: int, seed: int, one: int, other: int) -> None:
    def stream(size: int) -> np.ndarray:
        return np.concatenate([step_batch(num, [1.0], s, size, seed) for s in range(-(-100 // size))])[:100]

    assert np.array_equal(stream(one), stream(other))


def test_epochs_and_seeds_differ_in_their_order() -> None:
    orders = [epoch_order(100, [1.0], epoch, seed).tolist() for epoch in range(3) for seed in range(3)]
    assert len({tuple(order) for order in orders}) == 9


def test_the_order_is_the_same_on_every_machine_and_for_ever() -> None:
    assert step_batch(10, [1.0], 0, 5, 42).tolist() == [0, 1, 4, 2, 6]
    assert step_batch(10, [1.0], 3, 5, 42).tolist() == [0, 4, 2, 7, 3]


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), seeds, st.booleans(), st.integers(0, 5))
def test_a_weight_is_how_often_an_epoch_sees_each_row_of_a_source(
    sources: list[int], seed: int, shuffle: bool, epoch: int
) -> None:
    weights = [1.0, 2.0, 3.0]
    order = epoch_order(np.array(sources), weights, epoch, seed, shuffle)
    assert len(order) == samples_per_epoch(np.array(sources), weights)
    counts = np.bincount(order, minlength=len(sources))
    assert counts.tolist() == [int(weights[source]) for source in sources]


@settings(deadline=None)
@given(st.integers(2, 40), seeds, st.booleans(), st.sampled_from([0.25, 0.5, 0.7, 1.5, 2.25]))
def test_a_fractional_weight_sees_another_part_each_epoch_and_all_rows_equally_often(
    num: int, seed: int, shuffle: bool, weight: float
) -> None:
    epochs = [epoch_order(num, [weight], epoch, seed, shuffle) for epoch in range(num)]
    for order in epochs:
        assert len(order) == samples_per_epoch(num, [weight])
        assert set(np.bincount(order, minlength=num)) <= {int(weight), int(weight) + 1}
    assert len(set(np.bincount(np.concatenate(epochs), minlength=num))) == 1
    if weight == 0.5 and num % 2 == 0:
        assert sorted([*epochs[0], *epochs[1]]) == list(range(num))


def test_unshuffled_sources_follow_each_other_in_file_order() -> None:
    sources = np.array([0, 0, 0, 0, 1, 1])
    assert epoch_order(sources, [0.5, 2.0], 0, 7, shuffle=False).tolist() == [0, 1, 4, 5, 4, 5]
    assert epoch_order(sources, [0.5, 2.0], 1, 7, shuffle=False).tolist() == [2, 3, 4, 5, 4, 5]


def test_a_run_may_end_within_an_epoch() -> None:
    assert num_steps(10, 4, 0.5) == 2
    batches = [step_batch(10, [1.0], step, 4, 0, shuffle=False, epochs=0.5).tolist() for step in range(2)]
    assert batches == [[0, 1, 2, 3], [4]]


def test_a_step_may_be_larger_than_the_data() -> None:
    batch = step_batch(3, [1.0], 1, 8, seed=1)
    assert len(batch) == 8 and set(np.bincount(batch)) <= {2, 3}
