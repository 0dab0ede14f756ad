"""Gathered keys and values are torch's to the bit, and their gradients are sums in float32; under Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from megadpo.model.attention.gather_keys import Readers, gather_keys, readers_of

KEYS_G = np.array([0, 1, 2, 0, 1, 3, 4, 0, 1, 5, 7])
"""A prompt of two keys with three readers, and a key (6) that nothing reads."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _readers(keys_G: np.ndarray, num_keys: int) -> Readers:
    return Readers(*(torch.from_numpy(x).to(DEVICE) for x in (keys_G, *readers_of(keys_G, num_keys))))


def _projected(num_keys: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys, and values that are a view of something packed, as a projection gives them."""
    generator = torch.Generator().manual_seed(num_heads)
    packed = torch.randn(num_keys, num_heads, 3, head_dim, generator=generator).to(DEVICE, dtype)
    return packed[:, :, 1].contiguous().requires_grad_(), packed[:, :, 2].requires_grad_()


@pytest.mark.parametrize("num_copies", [1, 2, 8])
@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 64), (2, 80), (3, 16)])
def test_copies_are_torch_s_and_gradients_the_sum_over_the_readers(num_heads, head_dim, num_copies):
    key, value = _projected(8, num_heads, head_dim, torch.float32)
    ours = [gather_keys(x, _readers(KEYS_G, 8), num_copies) for x in (key, value)]
    index = torch.from_numpy(KEYS_G).to(DEVICE)
    wide = [x.detach().double().requires_grad_() for x in (key, value)]
    exact = [x.index_select(0, index).repeat_interleave(num_copies, dim=1) for x in wide]
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(n)).to(DEVICE) for n, x in enumerate(exact)]
    found = torch.autograd.grad(ours, (key, value), weights)
    expected = torch.autograd.grad(exact, wide, [weight.double() for weight in weights])
    for copied, of_torch in zip(ours, exact, strict=True):
        assert torch.equal(copied.double(), of_torch) and copied.is_contiguous()
    for gradient, sum_of_readers in zip(found, expected, strict=True):
        assert torch.allclose(gradient.double(), sum_of_readers, rtol=1e-6, atol=1e-6)
        assert not gradient[6].any()


def test_a_bf16_gradient_is_rounded_once():
    key, value = _projected(8, 2, 32, torch.bfloat16)
    gathered = [gather_keys(x, _readers(KEYS_G, 8), 2) for x in (key, value)]
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(x.shape, generator=generator).to(DEVICE, torch.bfloat16) for x in gathered]
    index = torch.from_numpy(KEYS_G).to(DEVICE)
    for gradient, weight in zip(torch.autograd.grad(gathered, (key, value), weights), weights, strict=True):
        exact = torch.zeros(8, 2, 32, dtype=torch.float64, device=DEVICE)
        exact.index_add_(0, index, weight.double().unflatten(1, (2, 2)).sum(2))
        rounding = exact.abs() * torch.finfo(torch.bfloat16).eps  # to the nearest is half of it; the interpreter cuts off
        assert ((gradient.double() - exact).abs() <= rounding + 1e-6).all()


def test_streams_without_keys_or_readers_give_nothing():
    key, _ = _projected(3, 2, 16, torch.float32)
    gathered = gather_keys(key, _readers(np.array([], np.int64), 3), 2)
    assert gathered.shape == (0, 4, 16)
    assert not torch.autograd.grad(gathered.sum(), key)[0].any()
