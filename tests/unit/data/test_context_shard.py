"""A stream cut over context ranks: equal tokens, near-equal attention, and nothing lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megadpo.data.batches.collate import collate_groups
from megadpo.data.batches.context_shard import shard_stream, token_costs, with_context_shard
from megadpo.data.batches.micro_batch import MicroBatch, Segment
from tests.helpers.models import random_groups


def shards_of(micro_batch: MicroBatch, num_parts: int) -> list[MicroBatch]:
    return [with_context_shard(micro_batch, num_parts, number) for number in range(num_parts)]


def costs_of(parts: list[list[range]], costs: np.ndarray) -> list[float]:
    return [sum(costs[chunk.start : chunk.stop].sum() for chunk in part) for part in parts]


def test_a_token_costs_the_keys_it_sees():
    assert token_costs([Segment(0, 3), Segment(3, 5, 0, 3)]).tolist() == [1, 2, 3, 4, 5]


def test_one_long_segment_is_cut_in_a_zig_zag():
    assert shard_stream(token_costs([Segment(0, 64)]), 2) == [[range(16), range(48, 64)], [range(16, 48)]]


@pytest.mark.parametrize("num_parts", [2, 3, 4, 8])
def test_attention_is_balanced_where_equal_tokens_in_order_are_not(num_parts):
    segments = [Segment(0, 4000), Segment(4000, 4800, 0, 4000), Segment(4800, 5100, 0, 4000)]
    lengths = np.full(24, 135)
    ends = 5100 + lengths.cumsum()
    segments += [Segment(int(end - length), int(end)) for end, length in zip(ends, lengths, strict=True)]
    costs = token_costs(segments)[: len(token_costs(segments)) // num_parts * num_parts]
    in_order = [
        [chunk]
        for chunk in (range(i * len(costs) // num_parts, (i + 1) * len(costs) // num_parts) for i in range(num_parts))
    ]
    assert max(costs_of(in_order, costs)) > 1.3 * costs.sum() / num_parts
    assert max(costs_of(shard_stream(costs, num_parts), costs)) <= 1.05 * costs.sum() / num_parts


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_groups=st.integers(0, 6),
    longest=st.sampled_from([2, 8, 60]),
    num_parts=st.sampled_from([1, 2, 3, 4, 8]),
    share_prompts=st.booleans(),
)
def test_the_parts_together_are_the_micro_batch(seed, num_groups, longest, num_parts, share_prompts):
    groups = random_groups(num_groups, seed, longest + 2)
    whole = collate_groups(groups, range(num_groups), share_prompts, multiple_of=num_parts)
    parts = [part for batch in shards_of(whole, num_parts) if (part := batch.shard) is not None]
    assert {len(part.tokens_T) for part in parts} == {len(whole.tokens_T) // num_parts}
    order = parts[0].order
    assert torch.equal(torch.cat([part.tokens_T for part in parts])[order], whole.tokens_T)
    assert torch.equal(torch.cat([part.positions_T for part in parts])[order], whole.positions_T)
    index = torch.cat([part.scored_index_N for part in parts])
    assert sorted(index.tolist()) == list(range(len(whole.scored_N)))
    assert torch.equal(torch.cat([part.targets_N for part in parts]), whole.targets_N[index])
    in_stream = torch.empty_like(order)
    in_stream[order] = torch.arange(len(order))
    assert torch.equal(in_stream[torch.cat([part.scored_N + part.first for part in parts])], whole.scored_N[index])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), num_parts=st.sampled_from([2, 3, 4]), share_prompts=st.booleans())
def test_every_token_sees_the_keys_it_saw_before_the_cut(seed, num_parts, share_prompts):
    whole = collate_groups(random_groups(3, seed, 30), range(3), share_prompts, multiple_of=num_parts)

    def keys_seen(segment, offset):  # of the query `offset` into the segment or piece
        own = range(segment.keys.start, segment.keys.stop - (segment.end - segment.start - 1 - offset))
        return set(range(segment.prompt_start, segment.prompt_end)) | set(own)

    expected = {s.start + i: keys_seen(s, i) for s in whole.segments for i in range(s.end - s.start)}
    found = {}
    for batch in shards_of(whole, num_parts):
        assert batch.shard is not None
        held = {place - batch.shard.first: token for token, place in enumerate(batch.shard.order.tolist())}
        assert [piece.start for piece in batch.shard.segments[1:]] == [piece.end for piece in batch.shard.segments[:-1]]
        found |= {held[p.start + i]: keys_seen(p, i) for p in batch.shard.segments for i in range(p.end - p.start)}
    assert found == expected
