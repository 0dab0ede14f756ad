"""Streams of segments, operands, and attention by its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megadpo.data.batches.collate import collate_groups
from megadpo.data.batches.context_shard import with_context_shard
from megadpo.data.groups import Group
from megadpo.model.attention.backends import backend_named

SCALE = 0.7

TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}


def stream(lengths: list[tuple[int, ...]], share_prompts: bool = True, part: int | None = None) -> tuple[Any, int, int]:
    """Segments or pieces, queries and keys of groups with a prompt and responses of these lengths."""
    groups = [
        Group((np.zeros(prompt, np.int32),), tuple(np.zeros(n, np.int32) for n in responses), row)
        for row, (prompt, *responses) in enumerate(lengths)
    ]
    micro_batch = collate_groups(groups, range(len(groups)), share_prompts, multiple_of=4)
    num_keys = len(micro_batch.tokens_T)
    if part is None:
        return micro_batch.segments, num_keys, num_keys
    held = with_context_shard(micro_batch, 2, part).shard
    assert held is not None
    return held.segments, len(held.tokens_T), num_keys


def operands(
    num_queries: int,
    num_keys: int,
    heads: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int = 16,
    value_dim: int | None = None,
) -> list[Tensor]:
    """Query, key, value, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    of_keys, of_values = head_dim, value_dim or head_dim
    shapes = [(num_queries, heads[0], of_keys), (num_keys, heads[1], of_keys)]
    shapes += [(num_keys, heads[1], of_values), (num_queries, heads[0], of_values)]
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def sinks_of(num_heads: int, dtype: torch.dtype) -> Tensor:
    """One that takes all of a softmax, one that takes nothing, and others between."""
    return torch.linspace(-3.0, 3.0, num_heads, dtype=torch.float64).to(dtype).requires_grad_()


def by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Any,
    window: int | None,
    softcap: float | None = None,
    sinks_A: Tensor | None = None,
) -> Tensor:
    """In fp64, with every query's keys counted one by one, and a key without a value for the sinks."""
    num_sharing = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(num_sharing, dim=1) for x in (key, value))
    outputs = []
    for segment in segments:
        seen = [*range(segment.prompt_start, segment.prompt_end), *range(segment.keys.start, segment.keys.stop)]
        for place in range(segment.end - segment.start):
            keys = seen[: len(seen) - (segment.end - segment.start) + place + 1][-window if window else 0 :]
            scores_AK = torch.einsum("ad,kad->ak", query[segment.start + place].double(), key[keys]) * SCALE
            if softcap is not None:
                scores_AK = softcap * torch.tanh(scores_AK / softcap)
            if sinks_A is not None:
                scores_AK = torch.cat([scores_AK, sinks_A.double()[:, None]], dim=1)
            outputs.append(torch.einsum("ak,kad->ad", scores_AK.softmax(-1)[:, : len(keys)], value[keys]))
    return torch.stack(outputs)


def attend(name: str, query: Tensor, key: Tensor, value: Tensor, segments: Any, window: int | None, *scores: Any) -> Tensor:
    """By the backend of that name; `scores`: softcap and sinks."""
    backend = backend_named(name)
    return backend.attend(query, key, value, backend.prepare(segments, window, key), SCALE, *scores)


def assert_same(
    backend: str,
    segments: Any,
    tensors: list[Tensor],
    window: int | None,
    tolerance: float | None = None,
    softcap: float | None = None,
    sinks_A: Tensor | None = None,
) -> None:
    """Output and gradients of `backend` are those of the definition, relative to their norms."""
    *inputs, d_output = tensors
    want = by_definition(*inputs, segments, window, softcap, sinks_A)
    leaves = inputs if sinks_A is None else [*inputs, sinks_A]
    exact = (want, *torch.autograd.grad(want, leaves, d_output.double()))
    assert_equal(backend, segments, tensors, window, exact, tolerance, softcap, sinks_A)


def assert_equal(
    backend: str,
    segments: Any,
    tensors: list[Tensor],
    window: int | None,
    exact: tuple[Tensor, ...],
    tolerance: float | None = None,
    softcap: float | None = None,
    sinks_A: Tensor | None = None,
) -> None:
    """`assert_same`, where the definition's output and gradients are there already."""
    *inputs, d_output = tensors
    found = attend(backend, *inputs, segments, window, softcap, sinks_A)
    assert found.dtype is inputs[0].dtype and found.shape == d_output.shape
    leaves = inputs if sinks_A is None else [*inputs, sinks_A]
    names = ("output", "query", "key", "value", "sinks")[: 1 + len(leaves)]
    for name, ours, theirs in zip(names, (found, *torch.autograd.grad(found, leaves, d_output)), exact, strict=True):
        # A query that sees one key has a gradient of zero, the difference of terms of about one, and a sink's is a sum of
        # as many such terms as there are queries: no less is asked of them.
        num_terms = theirs.numel() * (len(d_output) if name == "sinks" else 1)
        norm = max(float(theirs.detach().norm()), 0.5 * num_terms**0.5)
        error = float((ours.detach().double() - theirs.detach()).norm()) / norm
        assert error <= (tolerance or TOLERANCES[ours.dtype]), f"{name}: {error}"


SHAPES = {
    "pairs": [(9, 5, 7), (3, 11, 2), (12, 4, 4)],
    "lists and single answers": [(6, 3), (5, 4, 2, 6, 1), (8, 3, 3, 9)],
    "one long among short ones": [(3, 2, 2), (70, 30, 41), (4, 1, 2)],
    "answers without a prompt": [(0, 9, 5), (7, 6, 6)],
    "single tokens": [(1, 1, 1), (1, 1)],
}


FOR_SEQUENCES = ("varlen", "flash_attn", "transformer_engine")
"""Those that call a GPU kernel for sequences of different lengths."""


SCORES = [(1.5, False, None), (None, True, None), (None, False, 8), (1.5, True, 24)]
"""Softcap, whether there are sinks, and head dimension of the values: each alone, and all together."""
