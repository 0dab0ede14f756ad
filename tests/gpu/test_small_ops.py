"""On a CUDA device: Triton's operations by themselves at a model's sizes, and a model of them against one of torch's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megadpo.config.schema import ModelConfig
from megadpo.model.activations import Activations
from megadpo.parallel.layout import Layout
from tests.gpu.machine import on
from tests.helpers import oracle
from tests.helpers.models import random_groups, save_model
from tests.parity.worker import Case, outcomes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TOKENS = 1000
"""Of no power of two."""


@pytest.fixture(autouse=True)
def needs_triton() -> None:
    pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "hidden"), [(TOKENS, 2048), (16 * TOKENS, 128), (TOKENS, 5120), (100, 16384)])
def test_rms_norm_is_as_near_to_exact_numbers_as_torch_s(dtype, rows, hidden):
    from megadpo.model.small_ops.rms_norm import rms_norm

    def results(function, dtype):
        leaves = [leaf.to(dtype).requires_grad_() for leaf in (x, weight)]
        output = function(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, gradient.to(dtype))]

    def theirs(x, weight):
        return torch.nn.functional.rms_norm(x, (hidden,), weight, 1e-5)

    torch.manual_seed(0)
    x, gradient = (torch.randn(rows, hidden, device="cuda").to(dtype) for _ in range(2))
    weight = torch.randn(hidden, device="cuda").to(dtype)
    kernel = results(lambda x, weight: rms_norm(x, weight, 1e-5), dtype)
    for ours, torch_s, exact in zip(kernel, results(theirs, dtype), results(theirs, torch.float64), strict=True):
        check(ours, torch_s, exact)
    assert torch.equal(rms_norm(x, weight, 1e-5)[33:40], rms_norm(x[33:40], weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "hidden"), [(TOKENS, 2048), (16 * TOKENS, 1024), (TOKENS, 5120), (100, 16384)])
def test_an_add_with_the_norm_of_its_sum_is_as_near_to_exact_numbers_as_torch_s_two_and_has_the_bits_of_ours(
    dtype, rows, hidden
):
    from megadpo.model.small_ops.add_norm import add_rms_norm
    from megadpo.model.small_ops.rms_norm import rms_norm

    def results(function, dtype):
        leaves = [leaf.to(dtype).requires_grad_() for leaf in (x, residual, weight)]
        outputs = function(*leaves)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [gradient.to(dtype) for gradient in gradients])]

    def theirs(x, residual, weight):
        total = residual + x
        return total, torch.nn.functional.rms_norm(total, (hidden,), weight, 1e-5)

    torch.manual_seed(0)
    x, residual, *gradients = (torch.randn(rows, hidden, device="cuda").to(dtype) for _ in range(4))
    weight = torch.randn(hidden, device="cuda").to(dtype)
    kernel = results(lambda x, residual, weight: add_rms_norm(x, residual, weight, 1e-5), dtype)
    for ours, torch_s, exact in zip(kernel, results(theirs, dtype), results(theirs, torch.float64), strict=True):
        check(ours.detach(), torch_s.detach(), exact.detach())
    assert torch.equal(kernel[0], residual + x) and torch.equal(kernel[1], rms_norm(residual + x, weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [768, 6144, 13824])
def test_swiglu_is_as_near_to_exact_numbers_as_torch_s(dtype, columns):
    from megadpo.model.small_ops.swiglu import swiglu

    def results(function, dtype):
        leaf = x.to(dtype).requires_grad_()
        output = function(leaf)
        return [output.detach(), *torch.autograd.grad(output, leaf, gradient.to(dtype))]

    def theirs(x):
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    torch.manual_seed(0)
    x, gradient = (torch.randn(TOKENS, 1, n, device="cuda").to(dtype) for n in (2 * columns, columns))
    for ours, torch_s, exact in zip(
        results(swiglu, dtype), results(theirs, dtype), results(theirs, torch.float64), strict=True
    ):
        check(ours, torch_s, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), [(16, 8, 128), (64, 8, 80), (5, 1, 256)])
def test_queries_and_keys_are_turned_where_they_lie_and_turned_back(dtype, heads, key_heads, head_dim):
    from megadpo.model.small_ops.rope import rotate

    def theirs(x, dtype):
        cosine, sine = (torch.cat([table, table], dim=-1)[:, None].to(dtype) for table in (angles.cos(), angles.sin()))
        left, right = x.to(dtype).chunk(2, dim=-1)
        return x.to(dtype) * cosine + torch.cat([-right, left], dim=-1) * sine

    torch.manual_seed(0)
    packed = torch.randn(TOKENS, heads + 2 * key_heads, head_dim, device="cuda").to(dtype)
    query, key, _ = (x.requires_grad_() for x in packed.detach().split([heads, key_heads, key_heads], dim=1))
    positions = torch.arange(TOKENS, device="cuda").float()
    angles = torch.outer(positions, 10_000.0 ** -(torch.arange(head_dim // 2, device="cuda") / (head_dim // 2)))
    turned = rotate(query, key, angles.cos(), angles.sin())
    back = torch.autograd.grad(turned, [query, key], [x.detach() for x in turned])
    for x, ours, again in zip((query, key), turned, back, strict=True):
        check(ours.detach(), theirs(x.detach(), dtype), theirs(x.detach(), torch.float64))
        torch.testing.assert_close(again, x.detach(), rtol=1e-5 if dtype is torch.float32 else 2e-2, atol=2e-2)


def check(ours: torch.Tensor, torch_s: torch.Tensor, exact: torch.Tensor) -> None:
    assert ours.dtype == torch_s.dtype and ours.shape == torch_s.shape
    if ours.dtype is torch.float32:
        apart = (ours.double() - torch_s.double()).norm()
        assert apart <= 1e-6 * exact.norm() + (torch_s.double() - exact).norm()
    else:
        assert (ours.double() - exact).norm() <= 1.5 * (torch_s.double() - exact).norm()


@pytest.mark.xdist_group("fp32")
def test_a_model_of_triton_s_operations_is_one_of_torch_s_with_margins_of_exactly_zero(tmp_path):
    policy = save_model(tmp_path, "qwen3", seed=0, tokenizer=False)
    cases = [Case(Layout(), tokens_per_micro_batch=200, model=ModelConfig(small_ops=name)) for name in ("torch", "triton")]
    torch_s, ours = on("cuda", outcomes, policy, policy, random_groups(13, seed=3), cases, 2)
    torch.testing.assert_close(ours.logps, torch_s.logps, rtol=1e-5, atol=1e-4)
    assert oracle.worst_relative_error(ours.gradients, torch_s.gradients)[0] <= 1e-4
    # Layers that are computed again as a whole add by themselves, and a reference's with the norms.
    again = [replace(cases[1], memory=Activations(recompute)) for recompute in ("none", "small", "full")]
    for found in on("cuda", outcomes, policy, policy, random_groups(13, seed=3), again, 2, torch.bfloat16):
        assert len(found.margins) and not found.margins.any()
    assert not ours.margins.any()
