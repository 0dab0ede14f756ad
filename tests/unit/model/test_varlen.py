"""The kernels for sequences on a real GPU, which test_attention_backends.py holds to their written contract."""

from __future__ import annotations

import pytest
import torch

from megadpo.model.attention.backends import backend_named
from megadpo.model.attention.base import AttentionNeeds
from tests.helpers.attention import FOR_SEQUENCES, SCALE, SHAPES, by_definition, operands, stream

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("shape", ["pairs", "lists and single answers", "one long among short ones"])
@pytest.mark.parametrize("window", [None, 6, 33])
@pytest.mark.parametrize("name", FOR_SEQUENCES)
def test_outputs_and_gradients_are_those_of_the_definition(name, window, shape):
    backend, device = backend_named(name), torch.device("cuda", 0)
    reason = backend.why_not(AttentionNeeds(device, torch.bfloat16, 16))
    if reason is not None:
        pytest.skip(reason)
    for share_prompts, part in ((True, None), (False, None), (True, 0), (True, 1)):
        segments, num_queries, num_keys = stream(SHAPES[shape], share_prompts, part)
        *inputs, d_output = operands(num_queries, num_keys, (4, 2), torch.bfloat16)
        want = by_definition(*inputs, segments, window)
        exact = (want, *torch.autograd.grad(want, inputs, d_output.double()))
        inputs = [tensor.detach().to(device).requires_grad_() for tensor in inputs]
        found = backend.attend(*inputs, backend.prepare(segments, window, inputs[1]), SCALE)
        ours = (found, *torch.autograd.grad(found, inputs, d_output.to(device)))
        for a, b in zip(ours, exact, strict=True):
            assert float((a.cpu().double() - b).norm() / b.norm()) < 2e-2
