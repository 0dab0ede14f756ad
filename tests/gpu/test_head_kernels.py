"""On a CUDA device: the head's kernels equal their torch twin and are as exact as torch, and the head its CPU self."""

from __future__ import annotations

import pytest
import torch

from megadpo.model.heads.kernels import PARTS, NativeKernels, TorchKernels
from megadpo.model.heads.logprob import add_product

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.xdist_group("head"),  # many small ones, and the kernels are built once
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [0, 1, 7, 8, 9, 511, 513, 4097, 151936])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_every_shape_equals_the_torch_twin(dtype, columns, rows):
    generator = torch.Generator("cuda").manual_seed(columns)
    logits = (4 * torch.randn(rows, columns, generator=generator, device="cuda")).to(dtype)
    targets = torch.randint(-columns, 2 * columns + 1, (rows,), generator=generator, device="cuda")
    gradient = torch.randn(rows, generator=generator, device="cuda")
    wanted = ("logp", "entropy", "mean_logit", "log_square")
    parts = [torch.full((rows, len(PARTS)), 7.0, device="cuda") for _ in range(2)]
    both = (NativeKernels("cuda"), TorchKernels())
    for kernel, out in zip(both, parts, strict=True):
        kernel.parts(logits, targets, wanted, out)
    torch.testing.assert_close(*parts, rtol=1e-5, atol=1e-4 * max(1, columns) ** 0.5)
    log_normaliser = logits.double().logsumexp(-1).float()
    tiles = [logits.clone(), logits.clone()]
    for kernel, tile in zip(both, tiles, strict=True):
        kernel.gradient_(tile, targets, log_normaliser, gradient)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 8e-3, "atol": 1e-6}
    torch.testing.assert_close(tiles[0].float(), tiles[1].float(), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_at_most_twice_torchs_own(dtype):
    logits = (4 * torch.randn(256, 32003, device="cuda")).to(dtype)
    targets = torch.randint(0, 32003, (256,), device="cuda")
    out = torch.empty(256, len(PARTS), device="cuda")
    NativeKernels("cuda").parts(logits, targets, ("logp",), out)
    maximum, exponentials, target = out.unbind(1)[:3]
    exact = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torchs = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    ours = target - maximum - exponentials.log()
    assert (ours.double() - exact).norm() <= 2 * (torchs.double() - exact).norm()


@pytest.mark.parametrize("beta", [0, 1])
def test_bfloat16_products_are_added_up_in_float32(beta):
    left = torch.randn(300, 40, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(40, 64, device="cuda", dtype=torch.bfloat16)
    total = torch.randn(300, 64, device="cuda")
    expected = beta * total.double() + left.double() @ right.double()
    add_product(total, left, right, beta)
    torch.testing.assert_close(total.double(), expected, rtol=1e-2, atol=5e-2)
