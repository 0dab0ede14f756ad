"""What families ask of attention beyond a plain softmax: softcaps, sinks, and values of another head dimension than keys."""

from __future__ import annotations

import functools

import pytest
import torch

from megadpo.model.attention import cpu_blocks as attention_blocks
from megadpo.model.attention import explicit
from tests.helpers.attention import (
    SCORES,
    SHAPES,
    TOLERANCES,
    assert_equal,
    assert_same,
    by_definition,
    operands,
    sinks_of,
    stream,
)

WAYS = {
    "blocks": ("cpu_flash", 0),
    "blocks and batches": ("cpu_flash", 40),
    "batches": ("cpu_flash", 512),
    "buckets": ("buckets", 512),
    "sdpa": ("sdpa", 512),
}


LENGTHS = [(20, 12, 15), (3, 2, 2), (4, 1)]
"""One group long enough for blocks where `MAX_UNIT` is 40, and short ones."""

STREAMS = [(None, True, None), (6, True, None), (None, False, None), (6, True, 0), (None, True, 1)]
"""Window, whether prompts are shared, and which part context parallelism leaves of the stream."""


@functools.cache
def expected(number, softcap, has_sinks, value_dim):
    """Segments, operands, window, sinks, and what the definition makes of them."""
    window, share_prompts, part = STREAMS[number]
    segments, num_queries, num_keys = stream(LENGTHS, share_prompts, part)
    tensors = operands(num_queries, num_keys, (4, 2), torch.float32, value_dim=value_dim)
    sinks_A = sinks_of(4, torch.float32) if has_sinks else None
    *inputs, d_output = tensors
    want = by_definition(*inputs, segments, window, softcap, sinks_A)
    leaves = inputs if sinks_A is None else [*inputs, sinks_A]
    return segments, tensors, window, sinks_A, (want, *torch.autograd.grad(want, leaves, d_output.double()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("softcap", "has_sinks", "value_dim"), SCORES, ids=str)
def test_outputs_and_gradients_those_of_the_sinks_too(monkeypatch, way, softcap, has_sinks, value_dim):
    backend, largest_unit = WAYS[way]
    monkeypatch.setattr(attention_blocks, "MAX_UNIT", largest_unit)
    for number in range(len(STREAMS)):
        segments, tensors, window, sinks_A, exact = expected(number, softcap, has_sinks, value_dim)
        assert_equal(backend, segments, tensors, window, exact, softcap=softcap, sinks_A=sinks_A)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("way", ["blocks", "batches", "buckets", "sdpa"])
def test_dtypes_and_fewer_key_value_heads(monkeypatch, way, dtype):
    backend, largest_unit = WAYS[way]
    monkeypatch.setattr(attention_blocks, "MAX_UNIT", largest_unit)
    segments, num_queries, num_keys = stream(SHAPES["pairs"])
    for heads in ((4, 4), (6, 2), (3, 1)):
        tensors = operands(num_queries, num_keys, heads, dtype)
        assert_same(backend, segments, tensors, 6, softcap=2.0, sinks_A=sinks_of(heads[0], dtype))
        assert_same(backend, segments, tensors, None, sinks_A=sinks_of(heads[0], dtype))


@pytest.mark.parametrize("way", ["blocks", "batches", "sdpa"])
def test_scores_in_memory_are_a_tile_s(monkeypatch, way):
    backend, largest_unit = WAYS[way]
    monkeypatch.setattr(attention_blocks, "MAX_UNIT", largest_unit)
    monkeypatch.setattr(explicit, "MAX_SCORES", 4 * 7 * 20)
    segments, num_queries, num_keys = stream(LENGTHS)
    assert_same(backend, segments, operands(num_queries, num_keys, (4, 2), torch.float32), None, softcap=1.5)


@pytest.mark.parametrize("way", WAYS)
def test_sinks_far_above_and_far_below_the_scores_neither_overflow_nor_disappear(monkeypatch, way):
    backend, largest_unit = WAYS[way]
    monkeypatch.setattr(attention_blocks, "MAX_UNIT", largest_unit)
    segments, num_queries, num_keys = stream(SHAPES["pairs"])
    sinks_A = torch.tensor([200.0, -200.0, 20.0, -20.0], requires_grad=True)
    assert_same(backend, segments, operands(num_queries, num_keys, (4, 2), torch.float32), None, sinks_A=sinks_A)
