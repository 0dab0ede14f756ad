"""RMSNorm, SwiGLU and rope by Triton kernels: torch's numbers, under Triton's interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

triton = pytest.importorskip("triton")

from triton.runtime import interpreter  # noqa: E402

from megadpo.config.schema import ModelConfig  # noqa: E402
from megadpo.model.small_ops import add_norm as add_norm_file  # noqa: E402
from megadpo.model.small_ops import rms_norm as rms_norm_file  # noqa: E402
from megadpo.model.small_ops.add_norm import add_rms_norm  # noqa: E402
from megadpo.model.small_ops.rms_norm import rms_norm  # noqa: E402
from megadpo.model.small_ops.rope import rotate  # noqa: E402
from megadpo.model.small_ops.swiglu import swiglu  # noqa: E402
from megadpo.parallel.layout import Layout  # noqa: E402
from tests.helpers import oracle  # noqa: E402
from tests.helpers.models import random_groups, save_model  # noqa: E402
from tests.helpers.worlds import run_world  # noqa: E402
from tests.parity.worker import Case, outcomes  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
FP32_ERROR = 1e-6
TRITON = ModelConfig(small_ops="triton")
TORCH_S_ERROR = 1.5
"""How much further from exact numbers than torch's own the kernels' may be in bf16."""


@pytest.fixture(autouse=True)
def rounded_to_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts off what bf16 has no place for, where a GPU rounds to the nearest number; here it rounds."""
    if DEVICE == "cuda":
        return
    cut = interpreter._convert_float

    def converted(numbers: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (triton.language.float32, triton.language.bfloat16):
            return torch.tensor(numbers).bfloat16().view(torch.uint16).numpy()
        return cut(numbers, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", converted)


def results(function: Callable[..., Tensor], leaves: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of the leaves, computed in `dtype` for a gradient of the output that is the same in all."""
    leaves = [leaf.detach().to(DEVICE, dtype, copy=True).requires_grad_() for leaf in leaves]
    output = function(*leaves)
    torch.manual_seed(1)
    output.backward(torch.randn(output.shape).bfloat16().to(output))
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def check(kernel: Callable[..., Tensor], twin: Callable[..., Tensor], leaves: list[Tensor], dtype: torch.dtype) -> None:
    """Numbers as near to exact ones as the tolerance says, in `dtype`; leaves hold numbers that bf16 has."""
    leaves = [leaf.bfloat16() for leaf in leaves]
    found, theirs, exact = (results(f, leaves, d) for f, d in ((kernel, dtype), (twin, dtype), (twin, torch.float64)))
    for ours, torch_s, true in zip(found, theirs, exact, strict=True):
        assert ours.dtype == torch_s.dtype == dtype and ours.shape == torch_s.shape
        ours, torch_s = ours.double(), torch_s.double()
        if dtype is torch.float32:
            assert (ours - torch_s).norm() <= FP32_ERROR * torch_s.norm()
        else:
            assert (ours - true).norm() <= TORCH_S_ERROR * (torch_s - true).norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [((37, 1), 96), ((5, 3), 128), ((1, 1), 3), ((3,), 5000), ((2,), 16384)])
def test_rms_norm_and_its_gradients_are_torch_s(dtype, rows, hidden):
    torch.manual_seed(0)
    leaves = [3 * torch.randn(*rows, hidden), 1 + torch.randn(hidden) / 2]
    check(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, (hidden,), w, 1e-5), leaves, dtype)


def test_a_program_sums_the_weight_s_gradient_over_all_of_its_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(rms_norm_file, "MAX_PROGRAMS", 3)
    monkeypatch.setattr(rms_norm_file, "BLOCK_NUMBERS", 64)
    test_rms_norm_and_its_gradients_are_torch_s(torch.float32, (41,), 24)


def add_twin(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    total = residual + x
    return torch.cat([total, F.rms_norm(total, weight.shape, weight, 1e-5)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [((37, 1), 96), ((5, 3), 128), ((1, 1), 3), ((2,), 16384)])
def test_an_add_with_the_norm_of_its_sum_and_their_gradients_are_torch_s(dtype, rows, hidden):
    torch.manual_seed(0)
    leaves = [3 * torch.randn(*rows, hidden), torch.randn(*rows, hidden), 1 + torch.randn(hidden) / 2]
    check(lambda x, r, w: torch.cat(add_rms_norm(x, r, w, 1e-5)), add_twin, leaves, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_add_with_the_norm_of_its_sum_has_the_bits_of_the_two_by_themselves(dtype):
    torch.manual_seed(0)
    x, residual, weight = (torch.randn(n, device=DEVICE).to(dtype) for n in ((70, 1, 96), (70, 1, 96), (96,)))
    total, normed = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, residual + x) and torch.equal(normed, rms_norm(total, weight, 1e-5))


def test_an_add_with_the_norm_of_its_sum_has_gradients_where_only_one_result_is_used(monkeypatch):
    monkeypatch.setattr(rms_norm_file, "BLOCK_NUMBERS", 64)
    monkeypatch.setattr(add_norm_file, "MAX_PROGRAMS", 3)
    torch.manual_seed(0)
    leaves = [torch.randn(41, 24), torch.randn(41, 24), torch.randn(24)]
    for used in (slice(0, 41), slice(41, 82)):
        check(
            lambda x, r, w, used=used: torch.cat(add_rms_norm(x, r, w, 1e-5))[used] + 0 * w,
            lambda x, r, w, used=used: add_twin(x, r, w)[used] + 0 * w,
            leaves,
            torch.float32,
        )
    x, residual, weight = (leaf.to(DEVICE).requires_grad_() for leaf in leaves)
    total, normed = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.autograd.grad(total.sum(), [x, weight], retain_graph=True, allow_unused=True)[1] is None
    x_gradient, residual_gradient = torch.autograd.grad(normed.sum(), [x, residual])
    assert torch.equal(x_gradient, residual_gradient) and x_gradient.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_s_norm_does_not_depend_on_how_many_rows_there_are(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(70, 96, device=DEVICE).to(dtype), torch.randn(96, device=DEVICE).to(dtype)
    assert torch.equal(rms_norm(x, weight, 1e-5)[65:68], rms_norm(x[65:68], weight, 1e-5))


@pytest.mark.parametrize("heads", [lambda x: x[:, :, :, :2], lambda x: x[:, :, :, 2], lambda x: x.transpose(-1, 0)])
def test_heads_are_normed_where_they_lie_in_a_packed_projection(heads):
    """Two queries, a key and a value a group; the last ones' columns do not lie side by side."""
    torch.manual_seed(0)
    packed = torch.randn(5, 1, 3, 4, 16, device=DEVICE)
    weight = torch.randn(heads(packed).shape[-1], device=DEVICE)
    gradient = torch.randn(heads(packed).shape, device=DEVICE)
    found = []
    for given in (heads, lambda x: heads(x).contiguous()):
        leaves = packed.clone().requires_grad_(), weight.clone().requires_grad_()
        normed = rms_norm(given(leaves[0]), leaves[1], 1e-5)
        found.append([normed, *torch.autograd.grad(normed, leaves, gradient)])
        assert normed.is_contiguous()
    assert all(torch.equal(ours, copied) for ours, copied in zip(*found, strict=True))


def packed_twin(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(19, 1, 2 * 96), (3, 2 * 1031), (2, 2, 2)])
def test_swiglu_and_its_gradient_are_torch_s(dtype, shape):
    torch.manual_seed(0)
    check(swiglu, packed_twin, [2 * torch.randn(shape)], dtype)


def rope_twin(cosine_TN: Tensor, sine_TN: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Megatron's way, with queries and keys in one tensor."""

    def turned(x: Tensor) -> Tensor:
        cosine, sine = (torch.cat([table, table], dim=-1)[:, None].to(x) for table in (cosine_TN, sine_TN))
        left, right = x.chunk(2, dim=-1)
        return x * cosine + torch.cat([-right, left], dim=-1) * sine

    return lambda query, key: torch.cat([turned(query), turned(key)], dim=1)


def tables(num_tokens: int, num_pairs: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(num_tokens) % 7 * 40.0, 10_000.0 ** -(torch.arange(num_pairs) / num_pairs))
    return angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), [(4, 2, 8), (3, 3, 80), (40, 8, 128), (1, 1, 2)])
def test_rotated_queries_and_keys_and_their_gradients_are_megatron_s(dtype, heads, key_heads, head_dim):
    torch.manual_seed(0)
    cosine_TN, sine_TN = tables(9, head_dim // 2)

    def kernel(query: Tensor, key: Tensor) -> Tensor:
        return torch.cat(rotate(query, key, cosine_TN, sine_TN), dim=1)

    check(kernel, rope_twin(cosine_TN, sine_TN), [torch.randn(9, n, head_dim) for n in (heads, key_heads)], dtype)


def test_queries_and_keys_are_rotated_where_they_lie_in_a_packed_projection():
    torch.manual_seed(0)
    cosine_TN, sine_TN = tables(6, 4)

    def of_packed(rotated: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda packed: rotated(packed[:, :, :2].flatten(1, 2), packed[:, :, 2])

    ours = of_packed(lambda query, key: torch.cat(rotate(query, key, cosine_TN, sine_TN), dim=1))
    check(ours, of_packed(rope_twin(cosine_TN, sine_TN)), [torch.randn(6, 3, 4, 8)], torch.float32)


def test_rows_that_do_not_lie_side_by_side_are_taken():
    torch.manual_seed(0)
    weight = torch.randn(24)
    check(
        lambda x: rms_norm(x.transpose(0, 1), weight.to(x), 1e-5),
        lambda x: F.rms_norm(x.transpose(0, 1), (24,), weight.to(x), 1e-5),
        [torch.randn(5, 3, 24)],
        torch.float32,
    )
    check(lambda x: swiglu(x.t()), lambda x: packed_twin(x.t()), [torch.randn(24, 5)], torch.float32)
    cosine_TN, sine_TN = tables(5, 4)
    twin = rope_twin(cosine_TN, sine_TN)
    check(
        lambda x: torch.cat(rotate(x.transpose(1, 2), x.transpose(1, 2), cosine_TN, sine_TN), dim=1),
        lambda x: twin(x.transpose(1, 2), x.transpose(1, 2)),
        [torch.randn(5, 8, 3)],
        torch.float32,
    )


def test_an_empty_stream_gives_empty_results_and_a_weight_s_gradient_of_zero():
    weight = torch.ones(8, device=DEVICE, requires_grad=True)
    x, packed = (torch.empty(0, 1, n, device=DEVICE, requires_grad=True) for n in (8, 16))
    rms_norm(x, weight, 1e-5).sum().backward()
    sum(add_rms_norm(x, x, weight, 1e-5)).sum().backward()
    assert weight.grad is not None and not weight.grad.any() and x.grad is not None and x.grad.shape == x.shape
    swiglu(packed).sum().backward()
    assert packed.grad is not None and packed.grad.shape == packed.shape
    query, key = (torch.empty(0, n, 8, device=DEVICE) for n in (4, 2))
    assert [x.shape for x in rotate(query, key, *tables(0, 4))] == [(0, 4, 8), (0, 2, 8)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_inputs_are_kept_for_the_backward_pass_and_a_number_a_row(dtype):
    kept: list[Tensor] = []
    x = torch.randn(5, 16).to(DEVICE, dtype).requires_grad_()
    weight = torch.ones(16, device=DEVICE, dtype=dtype)
    query, (cosine_TN, sine_TN) = torch.randn(5, 2, 8).to(DEVICE, dtype).requires_grad_(), tables(5, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        rms_norm(x, weight, 1e-5), swiglu(x), rotate(query, query, cosine_TN, sine_TN)
        total, _ = add_rms_norm(x, x, weight, 1e-5)
    inputs = {tensor.data_ptr() for tensor in (x, weight, cosine_TN, sine_TN, total)}
    assert [tensor.numel() for tensor in kept if tensor.data_ptr() not in inputs] == [5, 5]


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="tests/gpu has it")
@pytest.mark.parametrize(
    "recompute", [("none", "small"), pytest.param(("full",), marks=pytest.mark.exhaustive)], ids=["kept", "recomputed"]
)
def test_a_model_of_these_operations_has_the_log_probs_and_gradients_of_torch_s_and_margins_of_exactly_zero(
    tmp_path, recompute
):
    model, groups = save_model(tmp_path, "qwen3", seed=0, num_hidden_layers=2, tokenizer=False), random_groups(1, seed=3)
    cases = [Case(Layout()), *(Case(Layout(), model=TRITON, recompute=one) for one in recompute)]
    torch_s, *ours = run_world(1, outcomes, model, model, groups, cases)[0]
    for found in ours:
        torch.testing.assert_close(found.logps, torch_s.logps, rtol=1e-6, atol=1e-5)
        assert oracle.worst_relative_error(found.gradients, torch_s.gradients)[0] <= 1e-5
        assert len(found.margins) and not found.margins.any()
