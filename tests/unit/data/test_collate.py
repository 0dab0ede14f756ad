"""Groups laid out as the streams of micro-batches, and what attention and head need to know of them."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megadpo.data.batches.collate import collate_groups, collate_step
from megadpo.data.batches.micro_batch import Segment
from megadpo.data.groups import Group
from megadpo.data.store import GroupStore
from tests.helpers.models import random_groups


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


SHARED = Group((ids(1, 2, 3),), (ids(4, 5), ids(6, 7, 8)), row=0)
UNSHARED = Group((ids(1, 2), ids(3)), (ids(4, 5), ids(6)), row=1)


def test_a_shared_prompt_stands_once_and_both_responses_go_on_from_its_end():
    batch = collate_groups([SHARED], [0])
    assert batch.tokens_T.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert batch.segments == (Segment(0, 3), Segment(3, 5, 0, 3), Segment(5, 8, 0, 3))


def test_the_end_of_a_shared_prompt_predicts_the_first_token_of_both_responses():
    batch = collate_groups([SHARED], [0])
    assert batch.scored_N.tolist() == [2, 3, 2, 5, 6]
    assert batch.targets_N.tolist() == [4, 5, 6, 7, 8]
    assert batch.response_N.tolist() == [0, 0, 1, 1, 1]
    assert batch.num_completion_tokens_R.tolist() == [2, 3] and batch.group_R.tolist() == [0, 0]


def test_without_sharing_each_response_has_its_own_prompt():
    batch = collate_groups([SHARED], [0], share_prompts=False)
    assert batch.tokens_T.tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]
    assert batch.segments == (Segment(0, 5), Segment(5, 11)) and batch.scored_N.tolist() == [2, 3, 7, 8, 9]


def test_different_prompts_are_laid_out_unshared():
    batch = collate_groups([UNSHARED], [7])
    assert batch.tokens_T.tolist() == [1, 2, 4, 5, 3, 6] and batch.segments == (Segment(0, 4), Segment(4, 6))
    assert batch.group_ids == (7,)


def test_without_a_prompt_the_first_token_has_no_log_prob():
    batch = collate_groups([Group((ids(),), (ids(4, 5), ids(6)), 0)], [0])
    assert batch.scored_N.tolist() == [0] and batch.targets_N.tolist() == [5] and batch.response_N.tolist() == [0]
    assert batch.num_responses == 2


def test_padding_attends_to_itself_and_is_never_scored():
    batch = collate_groups([SHARED], [0], multiple_of=3)
    assert len(batch.tokens_T) == 9 and batch.num_padding == 1 and batch.num_tokens == 8
    assert batch.segments[-1] == Segment(8, 9) and 8 not in batch.scored_N


def test_no_groups_make_a_stream_of_padding_with_nothing_to_score():
    batch = collate_groups([], [], multiple_of=2)
    assert len(batch.tokens_T) == 2 and batch.num_responses == 0 and len(batch.scored_N) == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.booleans()), min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from([1, 2, 4]),
)
def test_segments_cover_the_stream_and_every_completion_token_is_scored_once(sizes, share, multiple_of):
    groups = []
    for row, (prompt, chosen, rejected, same) in enumerate(sizes):
        prompts = (np.arange(prompt, dtype=np.int32),) * (1 if same else 2)
        groups.append(Group(prompts, (np.arange(chosen, dtype=np.int32), np.arange(rejected, dtype=np.int32)), row))
    batch = collate_groups(groups, range(len(groups)), share, multiple_of)
    ends = [0] + [segment.end for segment in batch.segments]
    assert [segment.start for segment in batch.segments] == ends[:-1] and ends[-1] == len(batch.tokens_T)
    assert len(batch.tokens_T) % multiple_of == 0
    assert batch.num_tokens == sum(group.num_stream_tokens(share) for group in groups)
    counts = torch.bincount(batch.response_N, minlength=batch.num_responses)
    assert counts.tolist() == batch.num_completion_tokens_R.tolist()
    # what a scored position predicts stands right behind it, or at the head of a response that shares its prompt
    starts = {segment.start for segment in batch.segments if segment.prompt_end > segment.prompt_start}
    for position, target in zip(batch.scored_N.tolist(), batch.targets_N.tolist(), strict=True):
        follows = {int(batch.tokens_T[position + 1])} | {int(batch.tokens_T[start]) for start in starts}
        assert target in follows


def test_a_group_needs_responses_that_are_not_empty():
    with pytest.raises(AssertionError):
        Group((ids(1),), (ids(),), 0)


def test_places_count_a_completion_s_tokens_from_one():
    assert collate_groups([SHARED], [0]).place_N.tolist() == [1, 2, 1, 2, 3]
    assert collate_groups([Group((ids(),), (ids(4, 5), ids(6)), 0)], [0]).place_N.tolist() == [2]


def test_scored_prompts_belong_to_the_first_response_at_place_zero():
    for share in (True, False):
        batch = collate_groups([SHARED, UNSHARED], [0, 1], share, score_prompts=True)
        assert batch.targets_N.tolist() == [2, 3, 4, 5, 6, 7, 8, 2, 4, 5, 6]
        assert batch.response_N.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
        assert batch.place_N.tolist() == [0, 0, 1, 2, 1, 2, 3, 0, 1, 2, 1]
        assert batch.num_completion_tokens_R.tolist() == [2, 3, 2, 1]
        for position, target in zip(batch.scored_N[:2].tolist(), batch.targets_N[:2].tolist(), strict=True):
            assert int(batch.tokens_T[position + 1]) == target


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["pairs", "lists", "labels", "examples"]),
    st.lists(st.integers(0, 11), min_size=1, max_size=8),
    st.booleans(),
    st.booleans(),
)
def test_groups_are_laid_out_from_the_store_as_they_are_one_by_one(kind, group_ids, share, score_prompts):
    groups = random_groups(12, seed=len(group_ids), longest=9, kind=kind, numbered=True)
    everything = [list(range(len(group_ids)))]
    (batch,) = collate_step(GroupStore.of(groups), group_ids, everything, share, score_prompts=score_prompts)
    tokens = num_responses = num_scored = 0
    for number in group_ids:
        one = collate_groups([groups[number]], [number], share, score_prompts=score_prompts)
        end, scored_end = tokens + len(one.tokens_T), num_scored + len(one.scored_N)
        assert torch.equal(batch.tokens_T[tokens:end], one.tokens_T)
        assert torch.equal(batch.positions_T[tokens:end], one.positions_T)
        assert torch.equal(batch.scored_N[num_scored:scored_end] - tokens, one.scored_N)
        assert torch.equal(batch.targets_N[num_scored:scored_end], one.targets_N)
        assert torch.equal(batch.place_N[num_scored:scored_end], one.place_N)
        assert torch.equal(batch.response_N[num_scored:scored_end] - num_responses, one.response_N)
        responses = slice(num_responses, num_responses + one.num_responses)
        assert torch.equal(batch.last_R[responses] - tokens, one.last_R)
        assert all(torch.equal(batch.row_values[name][responses], values) for name, values in one.row_values.items())
        tokens, num_scored, num_responses = end, scored_end, responses.stop
    assert (tokens, num_scored) == (len(batch.tokens_T), len(batch.scored_N)) and batch.group_ids == tuple(group_ids)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["pairs", "lists", "labels", "examples"]),
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 4]),
)
def test_the_micro_batches_of_a_step_are_those_that_its_groups_make_alone(kind, chosen, share, score_prompts, multiple_of):
    store = GroupStore.of(random_groups(20, seed=len(chosen), longest=9, kind=kind, numbered=True))
    group_ids = np.random.default_rng(len(chosen)).permutation(20)[: len(chosen)]
    # Group `place` goes into micro-batch chosen[place]; some have none.
    members = [[place for place, batch in enumerate(chosen) if batch == number] for number in range(4)]
    together = collate_step(store, group_ids, members, share, multiple_of, score_prompts=score_prompts)
    assert [batch.batch_positions for batch in together] == [tuple(places) for places in members]
    for batch, places in zip(together, members, strict=True):
        groups, own_ids = [store[int(group_ids[place])] for place in places], group_ids[places]
        alone = collate_groups(groups, own_ids, share, multiple_of, score_prompts=score_prompts)
        for field in fields(batch):
            ours, theirs = getattr(batch, field.name), getattr(alone, field.name)
            if isinstance(ours, torch.Tensor):
                assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), field.name
            elif field.name == "row_values":
                assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
            elif field.name != "batch_positions":
                assert ours == theirs, field.name
