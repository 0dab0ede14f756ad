"""Pairs cut into a stream of prompts and chosen answers and one of rejected answers: nothing lost, every key still seen."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megadpo.data.batches.collate import collate_groups
from megadpo.data.batches.halves import PairHalf, with_halves
from megadpo.data.batches.micro_batch import MicroBatch
from tests.helpers.models import random_groups

cases = settings(max_examples=40, deadline=None)
arguments = given(
    seed=st.integers(0, 10_000),
    num_groups=st.integers(0, 6),
    multiple_of=st.sampled_from([1, 2, 8]),
    share_prompts=st.booleans(),
)


def split(seed: int, num_groups: int, multiple_of: int, share_prompts: bool) -> tuple[MicroBatch, tuple[PairHalf, PairHalf]]:
    groups = random_groups(num_groups, seed, 12)
    whole = with_halves(collate_groups(groups, range(num_groups), share_prompts, multiple_of), multiple_of)
    first, second = whole.halves
    assert isinstance(first, PairHalf) and isinstance(second, PairHalf)
    return whole, (first, second)


@cases
@arguments
@example(0, 0, 1, True)
def test_the_halves_together_are_the_micro_batch(seed, num_groups, multiple_of, share_prompts):
    whole, (first, second) = split(seed, num_groups, multiple_of, share_prompts)
    assert all(len(half.tokens_T) and len(half.tokens_T) % multiple_of == 0 for half in (first, second))
    num_real = whole.num_tokens
    places = first.order[:num_real]
    assert torch.equal(torch.cat([first.tokens_T, second.tokens_T])[places], whole.tokens_T[:num_real])
    assert torch.equal(torch.cat([first.positions_T, second.positions_T])[places], whole.positions_T[:num_real])
    index = torch.cat([first.scored_index_N, second.scored_index_N])
    assert sorted(index.tolist()) == list(range(len(whole.scored_N)))
    assert torch.equal(torch.cat([first.targets_N, second.targets_N]), whole.targets_N[index])
    scored = torch.cat([first.scored_N, second.scored_N + second.first])
    assert torch.equal(scored, whole.halves[0].order[whole.scored_N[index]])


@cases
@arguments
def test_chosen_answers_are_in_the_first_half_and_rejected_ones_in_the_second(seed, num_groups, multiple_of, share_prompts):
    whole, (_, second) = split(seed, num_groups, multiple_of, share_prompts)
    is_second_R = whole.halves[0].order[whole.last_R] >= second.first
    assert is_second_R.tolist() == [False, True] * num_groups
    num_rejected = int(whole.num_completion_tokens_R[1::2].sum())
    num_held = sum(piece.end - piece.start for piece in second.segments[:num_groups])
    assert num_held >= num_rejected
    if share_prompts and num_groups < 5:  # every fifth pair has two prompts
        assert num_held == num_rejected


@cases
@arguments
def test_every_token_sees_the_keys_it_saw_in_the_whole(seed, num_groups, multiple_of, share_prompts):
    whole, halves = split(seed, num_groups, multiple_of, share_prompts)

    def keys_seen(segment, offset):  # of the query `offset` into the segment or piece
        own = range(segment.keys.start, segment.keys.stop - (segment.end - segment.start - 1 - offset))
        return {*range(segment.prompt_start, segment.prompt_end), *own}

    order = halves[0].order
    expected = {
        int(order[s.start + i]): {int(order[key]) for key in keys_seen(s, i)}
        for s in whole.segments
        for i in range(s.end - s.start)
        if s.start < whole.num_tokens
    }
    found = {}
    for half in halves:
        assert [piece.start for piece in half.segments[1:]] == [piece.end for piece in half.segments[:-1]]
        kept = [] if half.is_first else half.prompts_Q.tolist()
        keys = [*kept, *range(half.first, half.first + len(half.tokens_T))]
        found |= {
            half.first + p.start + i: {keys[k] for k in keys_seen(p, i)}
            for p in half.segments
            for i in range(p.end - p.start)
        }
    assert {query: found.get(query) for query in expected} == expected
