"""Attention in chunks: a query sees what it would see in a sequence of its own, and backends compute that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.masking_utils import create_chunked_causal_mask

from megadpo.data.batches.collate import collate_groups
from megadpo.data.batches.halves import with_halves
from megadpo.data.batches.micro_batch import Segment, ShardSegment
from megadpo.model.attention import cpu_blocks
from megadpo.model.attention.chunks import in_chunks
from tests.helpers.attention import SHAPES, assert_same, operands, stream
from tests.helpers.families import config_of
from tests.helpers.models import random_groups

SIZES = [1, 4, 9, 24]


def seen_by_each(segments: Any) -> list[list[int]]:
    """Of each query its keys, by what backends are told: of all but its last keys a query sees one fewer than the next."""
    seen = []
    for segment in segments:
        keys = [*range(segment.prompt_start, segment.prompt_end), *range(segment.keys.start, segment.keys.stop)]
        num_queries = segment.end - segment.start
        assert num_queries <= segment.keys.stop - segment.keys.start
        seen += [keys[: len(keys) - num_queries + place + 1] for place in range(num_queries)]
    return seen


def of_own_chunk(keys: list[int], size: int) -> list[int]:
    """Of all keys before and with a query those of its chunk: they lie in the order of its sequence."""
    return keys[(len(keys) - 1) // size * size :]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_query_sees_the_keys_of_its_own_chunk(shape: str, size: int) -> None:
    for share_prompts, part in ((True, None), (False, None), (True, 0), (True, 1)):
        segments, _, _ = stream(SHAPES[shape], share_prompts, part)
        cut = in_chunks(segments, size)
        assert seen_by_each(cut) == [of_own_chunk(keys, size) for keys in seen_by_each(segments)]
        there = [segment for segment in cut if segment.end > segment.start]
        assert [each.start for each in there[1:]] == [each.end for each in there[:-1]], "no query is left out"


def test_of_the_half_of_a_micro_batch_that_reads_the_other_s_prompts_too() -> None:
    groups = random_groups(7, seed=1)
    for half in with_halves(collate_groups(groups, range(7), True)).halves:
        assert seen_by_each(in_chunks(half.segments, 8)) == [of_own_chunk(keys, 8) for keys in seen_by_each(half.segments)]


def test_segments_that_fit_stay_as_they_are() -> None:
    segments = [Segment(0, 5), Segment(5, 8, 0, 5), ShardSegment(8, 10, 3, 11)]
    assert list(in_chunks(segments, 8)) == segments
    assert in_chunks(segments, None) is segments


@pytest.mark.parametrize(
    ("backend", "largest_unit"), [("cpu_flash", 0), ("cpu_flash", 40), ("buckets", 512), ("sdpa", 512)], ids=str
)
def test_outputs_and_gradients_of_segments_that_see_a_part_of_a_prompt(monkeypatch, backend: str, largest_unit: int) -> None:
    monkeypatch.setattr(cpu_blocks, "MAX_UNIT", largest_unit)
    for shape, part in (("pairs", None), ("answers without a prompt", 0)):
        segments, num_queries, num_keys = stream(SHAPES[shape], True, part)
        tensors = operands(num_queries, num_keys, (4, 2), torch.float32)
        assert_same(backend, in_chunks(segments, 7), tensors, None)


def test_chunks_are_counted_as_transformers_masks_count_them() -> None:
    config = config_of("llama4_text", attn_implementation="eager", attention_chunk_size=3)
    mask = create_chunked_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(1, 8, 64),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.arange(8)[None],
    )
    theirs = [torch.nonzero(row == 0).flatten().tolist() for row in mask[0, 0]]
    assert seen_by_each(in_chunks([Segment(0, 8)], 3)) == theirs
