"""Packing: nothing lost, nothing too long, as few micro-batches as best-fit needs, and ranks with near-equal work."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadpo.data.batches.bin_packing import (
    attention_pairs,
    best_fit_decreasing,
    check_groups_fit,
    group_costs,
    pack_by_subset_sums,
    pack_micro_batches,
)
from megadpo.data.batches.collate import collate_groups
from megadpo.data.groups import Group
from megadpo.data.store import GroupStore
from megadpo.errors import UserError


def lognormal_lengths(num: int, seed: int = 0, most: int = 2048) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(5.8, 0.7, num).astype(np.int64), 8, most)


def costs_of(lengths: np.ndarray) -> np.ndarray:
    return lengths + lengths.astype(np.float64) ** 2 / 4096


def bin_tokens(plan: list[list[list[int]]], lengths: np.ndarray) -> np.ndarray:
    return np.array([[lengths[members].sum() if members else 0 for members in rank] for rank in plan])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 100)), max_size=60), st.integers(100, 300), st.integers(1, 9))
def test_every_group_is_in_exactly_one_micro_batch_none_too_long_all_ranks_with_as_many(
    lengths_and_costs: list[tuple[int, int]], capacity: int, num_ranks: int
) -> None:
    lengths, costs = [length for length, _ in lengths_and_costs], [cost for _, cost in lengths_and_costs]
    plan = pack_micro_batches(lengths, costs, capacity, num_ranks)
    assert sorted(position for rank in plan for members in rank for position in members) == list(range(len(lengths)))
    assert len(plan) == num_ranks and len({len(rank) for rank in plan}) == 1 and len(plan[0]) >= 1
    assert bin_tokens(plan, np.array(lengths, np.int64)).max(initial=0) <= capacity
    assert all(members == sorted(members) for rank in plan for members in rank)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(100, 300), st.integers(1, 9))
def test_there_are_no_more_micro_batches_than_the_ranks_make_necessary(
    lengths: list[int], capacity: int, num_ranks: int
) -> None:
    plan = pack_micro_batches(lengths, np.ones(len(lengths)), capacity, num_ranks)
    num_bins = num_ranks * len(plan[0])
    alone = len(pack_micro_batches(lengths, np.ones(len(lengths)), capacity, 1)[0])
    # Best-fit never opens a bin for what an open one could hold, so any two bins hold more than one's capacity.
    assert alone <= 2 * sum(lengths) / capacity + 1
    assert num_bins == -(-alone // num_ranks) * num_ranks
    num_empty = sum(not members for rank in plan for members in rank)
    assert num_empty == max(num_bins - len(lengths), 0)


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(24)), st.integers(1, 4))
def test_packing_is_deterministic_and_blind_to_the_order_of_the_groups(order: list[int], num_ranks: int) -> None:
    lengths = lognormal_lengths(24)
    plan = pack_micro_batches(lengths, costs_of(lengths), 4096, num_ranks)
    assert plan == pack_micro_batches(lengths, costs_of(lengths), 4096, num_ranks)
    permuted = pack_micro_batches(lengths[order], costs_of(lengths[order]), 4096, num_ranks)
    back = [[sorted(order[position] for position in members) for members in rank] for rank in permuted]
    if len(set(lengths.tolist())) == len(lengths):
        assert back == plan


@pytest.mark.parametrize(("num_ranks", "num_groups"), [(2, 64), (4, 128), (8, 256), (8, 512), (64, 2048)])
def test_ranks_have_near_equal_work_on_preference_lengths(num_ranks: int, num_groups: int) -> None:
    worst = 1.0
    for seed in range(5):
        lengths = lognormal_lengths(num_groups, seed)
        costs = costs_of(lengths)
        plan = pack_micro_batches(lengths, costs, 8192, num_ranks)
        work = np.array([sum(costs[members].sum() for members in rank) for rank in plan])
        worst = max(worst, work.max() / work.mean())
    assert worst <= 1.05


def test_the_kth_micro_batches_of_all_ranks_are_alike() -> None:
    lengths = lognormal_lengths(512)
    costs = costs_of(lengths)
    plan = pack_micro_batches(lengths, costs, 8192, 8)
    slots = np.array([[costs[members].sum() for members in rank] for rank in plan])
    assert (slots.max(0) / slots.mean(0)).max() <= 1.05


def test_a_rank_that_gets_more_in_one_slot_gets_less_in_the_next() -> None:
    lengths = [100, 90, 80, 70, 60, 55, 54, 53]  # no two of them fit together
    plan = pack_micro_batches(lengths, lengths, 100, 2)
    # Always giving the first rank the longer one would make it 294 and 268.
    assert [sum(lengths[members[0]] for members in rank) for rank in plan] == [283, 279]


@pytest.mark.alone
def test_ten_thousand_groups_are_packed_within_a_second() -> None:
    lengths = lognormal_lengths(10_000)
    costs = costs_of(lengths)
    start = time.perf_counter()
    plan = pack_micro_batches(lengths, costs, 8192, 16)
    assert time.perf_counter() - start < 1.0
    assert lengths.sum() / (8192 * 16 * len(plan[0])) > 0.97


def test_a_million_groups_are_packed_within_five_seconds_and_fill_their_bins() -> None:
    lengths = lognormal_lengths(1_000_000)
    start = time.process_time()
    bins = best_fit_decreasing(lengths, 8192)
    assert time.process_time() - start < 5.0
    assert lengths.sum() / (8192 * len(bins)) > 0.995
    assert (np.bincount(np.concatenate([np.array(members) for members in bins])) == 1).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(60, 200))
def test_both_ways_of_packing_lose_nothing_and_put_nothing_beyond_the_capacity(lengths: list[int], capacity: int) -> None:
    tokens = np.array(lengths, np.int64)
    for bins in (best_fit_decreasing(tokens, capacity), pack_by_subset_sums(tokens, capacity)):
        assert sorted(place for members in bins for place in members) == list(range(len(lengths)))
        assert all(members and tokens[members].sum() <= capacity for members in bins)


def test_where_best_fit_needs_a_micro_batch_more_groups_are_fitted_together() -> None:
    lengths = np.array([4, 4, 3, 3, 3, 3])  # best-fit puts the two of 4 together
    assert len(best_fit_decreasing(lengths, 10)) == 3 and len(pack_by_subset_sums(lengths, 10)) == 2
    plan = pack_micro_batches(lengths, lengths, 10, 1)[0]
    assert [sorted(lengths[members].tolist()) for members in plan] == [[3, 3, 4], [3, 3, 4]]


def test_fewer_groups_than_ranks_leave_some_micro_batches_empty() -> None:
    assert pack_micro_batches([5, 9], [5.0, 9.0], 10, 4) == [[[1]], [[0]], [[]], [[]]]
    assert pack_micro_batches([], [], 10, 2) == [[[]], [[]]]


def test_a_group_longer_than_a_micro_batch_is_refused_by_row_and_setting() -> None:
    with pytest.raises(UserError, match=r"row 7 has 30 tokens, more than train.tokens_per_micro_batch = 20"):
        check_groups_fit([3, 30, 25], [4, 7, 9], 20)
    with pytest.raises(UserError, match=r"\(2 rows are too long\); raise reference.tokens_per_micro_batch to at least 30"):
        check_groups_fit([3, 30, 25], [4, 7, 9], 20, "reference.tokens_per_micro_batch")
    with pytest.raises(UserError, match="30 tokens"):
        pack_micro_batches([3, 30], [3, 30], 20, 1)
    check_groups_fit([20], None, 20)


def test_costs_count_what_each_query_attends_to() -> None:
    def group(prompts: list[int], responses: list[int]) -> Group:
        return Group(tuple(np.zeros(n, np.int32) for n in prompts), tuple(np.zeros(n, np.int32) for n in responses), row=0)

    groups = [group([7], [3, 5]), group([7, 2], [3, 5]), group([4], [6])]
    store = GroupStore.of(groups)
    for share in (True, False):
        expected = []
        for each in groups:
            own = share and each.shares_prompt
            pairs = sum(range(1, len(each.prompts[0]) + 1)) if own else 0
            for number, response in enumerate(each.responses):
                prompt = len(each.prompt_of(number))
                pairs += sum(prompt + k + 1 for k in range(len(response)))
                pairs += 0 if own else sum(range(1, prompt + 1))
            expected.append(pairs)
        assert attention_pairs(store, share).tolist() == expected
        costs = group_costs(store, share, hidden_size=10)
        assert np.allclose(costs, store.num_tokens(share) + np.array(expected) / 60)
        for score_prompts in (True, False):
            with_head = group_costs(store, share, hidden_size=10, head_work=2.0, score_prompts=score_prompts)
            scored = [len(collate_groups([each], [0], share, score_prompts=score_prompts).scored_N) for each in groups]
            assert np.allclose(with_head - costs, 2.0 * np.array(scored))
