"""NEFTune's noise: uniform, of the size that the paper says, each token's own, and the same however the stream is cut."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from megadpo.data.batches.collate import collate_groups
from megadpo.data.batches.context_shard import with_context_shard
from megadpo.data.batches.halves import with_halves
from megadpo.data.groups import Group
from megadpo.model.build import multiplied
from megadpo.model.families import shape_of
from megadpo.model.neftune import EmbeddingNoise, uniform
from tests.helpers.families import config_of

HIDDEN, ALPHA = 64, 5.0
GROUPS = [
    Group((np.arange(7, dtype=np.int32),), (np.arange(3, dtype=np.int32), np.arange(5, dtype=np.int32)), 0, {}),
    Group((np.arange(4, dtype=np.int32),), (np.arange(6, dtype=np.int32), np.arange(2, dtype=np.int32)), 1, {}),
]
LENGTHS = [7 + 5, 4 + 6]
"""Prompt and longest response."""


def noise_of(micro_batch, step: int = 0, seed: int = 1) -> torch.Tensor:
    """[tokens computed here, hidden], as a model's hooks add it to embeddings of zeros."""
    noise = EmbeddingNoise(ALPHA, seed, step, is_on=True)
    noise._look(None, (), {"packed_seq_params": type("Params", (), {"micro_batch": micro_batch})})
    return noise._add(None, (), torch.zeros(len(micro_batch.local.tokens_T), 1, HIDDEN))[:, 0]


@pytest.mark.parametrize(("family", "factor_on_noise"), [("gemma2", 1.0), ("gemma3_text", 1.0), ("granite", 3.0)])
def test_noise_is_added_to_what_the_embedding_module_of_transformers_gives(family: str, factor_on_noise: float) -> None:
    """With Gemma's factor in it; Granite's comes after, and so is the noise's, too."""
    shape = shape_of(config_of(family, **({"embedding_multiplier": 3.0} if family == "granite" else {})))
    embedding = torch.nn.Identity()
    embedding.register_forward_hook(functools.partial(multiplied, shape.embedding_multiplier, True))
    model = type("Model", (torch.nn.Module,), {"pre_process": True})()
    model.embedding = embedding
    noise, stream = EmbeddingNoise(ALPHA, 1, 0, is_on=True), collate_groups(GROUPS, [5, 9])
    noise.attach(cast(Any, SimpleNamespace(models=[model])), shape.embedding_module_multiplies)
    noise._micro_batch = stream
    embeddings = torch.ones(len(stream.local.tokens_T), 1, HIDDEN)
    expected = embeddings[:, 0] * shape.embedding_multiplier + factor_on_noise * noise_of(stream)
    torch.testing.assert_close(embedding(embeddings)[:, 0], expected)


def test_numbers_are_uniform_and_each_key_and_column_has_its_own():
    numbers = uniform(torch.arange(2000), 500)
    assert numbers.min() >= -1 and numbers.max() < 1 and len(numbers.unique()) > 0.95 * min(numbers.numel(), 1 << 20)
    assert abs(float(numbers.mean())) < 3e-3 and float(numbers.var()) == pytest.approx(1 / 3, rel=1e-2)
    histogram = torch.histc(numbers, 20, -1, 1) / numbers.numel()
    assert float((histogram - 1 / 20).abs().max()) < 1e-3
    for one, other in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1])):
        assert abs(float((one * other).mean())) < 2e-3


def test_noise_is_as_large_as_the_paper_says_for_the_longest_sequence_of_the_group():
    stream = collate_groups(GROUPS, [5, 9], multiple_of=16)
    noise = noise_of(stream)
    for start, length, total in ((0, 15, LENGTHS[0]), (15, 12, LENGTHS[1])):
        bound = ALPHA / math.sqrt(total * HIDDEN)
        own = noise[start : start + length]
        assert 0.97 * bound < float(own.abs().max()) <= bound
        assert float(own.var()) == pytest.approx(bound**2 / 3, rel=0.1)
    assert not noise[27:].any() and stream.num_padding == 5
    assert len(noise[:27].unique(dim=0)) == 27


def test_steps_and_seeds_have_noise_of_their_own():
    stream = collate_groups(GROUPS, [5, 9])
    first = noise_of(stream)
    assert torch.equal(first, noise_of(stream))
    assert not torch.isclose(first, noise_of(stream, step=1)).any(dim=1).all()
    assert not torch.isclose(first, noise_of(stream, seed=2)).any(dim=1).all()


def test_a_prompt_has_the_same_noise_where_each_response_has_a_copy_of_it():
    shared, apart = (noise_of(collate_groups(GROUPS, [5, 9], share_prompts=flag)) for flag in (True, False))
    assert torch.equal(apart[:7], shared[:7]) and torch.equal(apart[7:10], shared[7:10])
    assert torch.equal(apart[10:17], shared[:7]) and torch.equal(apart[17:22], shared[10:15])


def test_parts_of_a_stream_have_its_noise():
    whole = noise_of(collate_groups(GROUPS, [5, 9], multiple_of=4))
    stream = collate_groups(GROUPS, [5, 9], multiple_of=4)
    sharded = [with_context_shard(stream, 2, rank) for rank in range(2)]
    joined = torch.cat([noise_of(shard) for shard in sharded])
    assert torch.equal(joined[sharded[0].shard.order], whole)
    halved = with_halves(stream)
    joined = torch.cat([noise_of(halved.half(number)) for number in range(2)])
    assert torch.equal(joined[halved.halves[0].order[:27]], whole[:27])
