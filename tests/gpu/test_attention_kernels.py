"""Every attention kernel for CUDA against the definition, on a card; a CPU holds only what they are given to it."""

from __future__ import annotations

import pytest
import torch

from megadpo.model.attention.backends import BACKENDS, backend_named
from megadpo.model.attention.base import AttentionNeeds
from tests.helpers.attention import SCALE, SCORES, SHAPES, by_definition, operands, sinks_of, stream

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TOLERANCES = {torch.bfloat16: 2e-2, torch.float32: 1e-4}

ALL_SHAPES = [group for shape in SHAPES.values() for group in shape]

HEADS = [((4, 2), head_dim) for head_dim in (64, 80, 128, 256)] + [((4, 4), 128), ((8, 1), 128)]
"""Every head dimension, and every number of queries to a key, once: FlexAttention compiles a kernel for each of them."""


@pytest.mark.parametrize(("heads", "head_dim"), HEADS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", BACKENDS[1:])
def test_outputs_and_gradients_are_those_of_the_definition(name, dtype, heads, head_dim):
    backend, device = backend_named(name), torch.device("cuda", 0)
    windows = (None, 6) if heads == (4, 2) else (None,)
    reason = backend.why_not(AttentionNeeds(device, dtype, head_dim, len(windows) > 1))
    if reason is not None:
        pytest.skip(reason)
    streams = [stream(ALL_SHAPES), stream(SHAPES["pairs"], part=1)]
    if HEADS[0] == (heads, head_dim):
        streams.append(stream(SHAPES["single tokens"]))
    for segments, num_queries, num_keys in streams:
        for window in windows:
            *inputs, d_output = operands(num_queries, num_keys, heads, dtype, head_dim)
            inputs[0] = inputs[0] * (16 / head_dim) ** 0.5  # scores of one size, whatever the head dimension
            inputs = [tensor.detach().to(device).requires_grad_() for tensor in inputs]
            d_output = d_output.detach().to(device)
            want = by_definition(*inputs, segments, window)
            exact = (want, *torch.autograd.grad(want, inputs, d_output.double()))
            found = backend.attend(*inputs, backend.prepare(segments, window, inputs[1]), SCALE)
            for ours, theirs in zip((found, *torch.autograd.grad(found, inputs, d_output)), exact, strict=True):
                assert float((ours.double() - theirs).norm() / theirs.norm()) < TOLERANCES[dtype]


@pytest.mark.parametrize(("softcap", "has_sinks", "value_dim"), SCORES, ids=str)
@pytest.mark.parametrize("name", BACKENDS[1:])
def test_softcaps_sinks_and_values_of_another_dimension(name, softcap, has_sinks, value_dim):
    backend, device = backend_named(name), torch.device("cuda", 0)
    dtype, value_dim = torch.bfloat16, None if value_dim is None else 8 * value_dim
    reason = backend.why_not(AttentionNeeds(device, dtype, 128, True, value_dim, softcap is not None, has_sinks))
    if reason is not None:
        pytest.skip(reason)
    segments, num_queries, num_keys = stream(ALL_SHAPES)
    for window in (None, 6):
        *inputs, d_output = operands(num_queries, num_keys, (4, 2), dtype, 128, value_dim)
        inputs[0] = inputs[0] * (16 / 128) ** 0.5
        leaves = [*inputs, sinks_of(4, dtype)] if has_sinks else inputs
        leaves = [tensor.detach().to(device).requires_grad_() for tensor in leaves]
        scores = (softcap, leaves[3] if has_sinks else None)
        want = by_definition(*leaves[:3], segments, window, *scores)
        exact = (want, *torch.autograd.grad(want, leaves, d_output.to(device).double()))
        found = backend.attend(*leaves[:3], backend.prepare(segments, window, leaves[1]), SCALE, *scores)
        ours = (found, *torch.autograd.grad(found, leaves, d_output.to(device)))
        for a, b in zip(ours, exact, strict=True):
            assert float((a.double() - b).norm() / b.norm()) < TOLERANCES[dtype]
