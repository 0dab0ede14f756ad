"""Every attention kernel for CUDA against the definition, on a card; a CPU holds only what they are given to it."""

from __future__ import annotations

import pytest
import torch

from megadpo.model.attention.backends import BACKENDS, backend_named
from megadpo.model.attention.base import AttentionNeeds
from tests.helpers.attention import SCALE, SHAPES, by_definition, operands, stream

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
