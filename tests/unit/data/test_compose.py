"""Steps that fill micro-batches: exchanged groups, none lost, none twice, the same in every layout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadpo.data.batches.bin_packing import pack_micro_batches
from megadpo.data.batches.compose import FILL, compose_steps
from megadpo.data.batches.packed_dataset import PackedDataset, PackingOptions
from megadpo.data.batches.sampler import StepSampler
from megadpo.data.store import GroupStore
from megadpo.errors import UserError
from megadpo.validation.data import check_steps_can_fill
from megadpo.validation.load import load_config
from tests.helpers.models import random_groups


def preference_lengths(num: int, seed: int = 0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(5.8, 0.7, num).astype(np.int64), 8, 2048)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(50, 3000), st.integers(0, 99))
def test_every_group_is_in_one_step_and_steps_have_equal_numbers(
    num_steps: int, size: int, multiple_of: int, seed: int
) -> None:
    steps = compose_steps(preference_lengths(num_steps * size, seed), num_steps, multiple_of)
    assert steps.shape == (num_steps, size)
    assert sorted(steps.ravel().tolist()) == list(range(num_steps * size))
    assert (np.diff(steps, axis=1) > 0).all()


@pytest.mark.parametrize(("size", "capacity"), [(64, 8192), (64, 4096), (128, 16384)])
def test_steps_end_just_below_a_multiple_and_fill_their_micro_batches(size: int, capacity: int) -> None:
    lengths = preference_lengths(64 * size)
    drawn, composed = [], []
    for step, places in enumerate(compose_steps(lengths, 64, capacity)):
        multiples = lengths[places].sum() / capacity
        assert 0.97 * FILL < multiples / np.ceil(multiples) <= FILL + 0.01
        composed.append(_num_micro_batches(lengths[places], capacity))
        drawn.append(_num_micro_batches(lengths[step * size : (step + 1) * size], capacity))
    assert lengths.sum() / capacity / sum(composed) > 0.985
    assert sum(drawn) > 1.03 * sum(composed)


def _num_micro_batches(lengths: np.ndarray, capacity: int) -> int:
    return len(pack_micro_batches(lengths, lengths, capacity, 1)[0])


sizes = st.integers(2, 300)


@settings(deadline=None, max_examples=50)
@given(sizes, st.integers(1, 17), st.integers(0, 2**32), st.booleans(), st.sampled_from([1.0, 2.0, 2.5]))
def test_epochs_of_composed_steps_see_each_group_once(
    num_groups: int, size: int, seed: int, shuffle: bool, epochs: float
) -> None:
    batches = _composed(num_groups, size, seed, shuffle, epochs)
    steps = [batches.group_ids(step) for step in range(batches.num_steps or 0)]
    assert all(len(step) == size for step in steps[:-1]) and len(steps[-1]) > 0
    seen = np.concatenate(steps)
    assert len(seen) == max(round(num_groups * epochs), 1)
    for start in range(0, len(seen), num_groups):
        epoch = seen[start : start + num_groups]
        assert len(set(epoch.tolist())) == len(epoch), "no group twice in an epoch"


@settings(deadline=None, max_examples=50)
@given(sizes, st.integers(1, 17), st.integers(0, 2**32), st.lists(st.integers(0, 300), max_size=5))
def test_a_composed_step_does_not_depend_on_the_steps_before_it(
    num_groups: int, size: int, seed: int, others: list[int]
) -> None:
    batches = _composed(num_groups, size, seed)
    for step in [*others, 7]:
        assert np.array_equal(batches.group_ids(step), _composed(num_groups, size, seed).group_ids(step))


def _composed(num_groups: int, size: int, seed: int, shuffle: bool = True, epochs: float | None = None) -> StepSampler:
    lengths = preference_lengths(num_groups, 1)
    return StepSampler(num_groups, (1.0,), size, seed, shuffle, epochs, lengths, max(int(lengths.mean() * size), 1))


def test_groups_move_by_less_than_a_stretch_of_steps() -> None:
    lengths = preference_lengths(1000 * 8)
    batches = StepSampler(len(lengths), (1.0,), 8, 0, False, None, lengths, 4096)
    for step in range(1000):
        assert (np.abs(batches.group_ids(step) - step * 8) < 65 * 8).all()


@pytest.mark.parametrize(
    ("multiple", "samples", "message"),
    [
        (4000, 40, "a step of 8 pairs has [0-9]+ tokens on average; lower it to at most that, raise"),
        (100, 15, "an epoch of 15 pairs has no two steps of 8; remove it or lower train.pairs_per_step"),
    ],
)
def test_a_multiple_that_can_have_no_effect_is_refused(multiple: int, samples: int, message: str) -> None:
    packing = PackedDataset.of(GroupStore.of(random_groups(40)), PackingOptions(tokens_per_micro_batch=1000, hidden_size=8))
    config = load_config({"data": {"step_tokens_multiple_of": multiple}, "train": {"pairs_per_step": 8}})
    with pytest.raises(UserError, match=f"data.step_tokens_multiple_of .*{message}"):
        check_steps_can_fill(config, packing.num_tokens_G, samples)
