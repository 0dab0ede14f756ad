"""Our RMSNorm and SwiGLU give torch's results and gradients, and keep less of them for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megadpo.errors import UserError
from megadpo.model.norm import RMSNorm
from megadpo.model.small_ops import choice
from megadpo.model.small_ops.choice import SmallOps, choose_small_ops
from megadpo.model.swiglu import SwiGLU

ROWS, HIDDEN = 37, 96
DTYPES = [torch.float32, torch.bfloat16]


def results(function: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, list[Tensor], int]:
    """Output, gradients of the leaves for a fixed gradient of the output, and bytes kept beside the leaves."""
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    own = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = function(*leaves)
    torch.manual_seed(1)
    output.backward(torch.randn(output.shape).bfloat16().to(output.dtype))
    return output.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None], sum(kept.values())


def worst(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_torch_s_to_the_bit_and_its_gradients_as_near_to_exact_ones(dtype):
    torch.manual_seed(0)
    x, weight = (3 * torch.randn(ROWS, 1, HIDDEN)).to(dtype), (1 + torch.randn(HIDDEN) / 2).to(dtype)
    norm = RMSNorm(SimpleNamespace(use_cpu_initialization=True, params_dtype=dtype, sequence_parallel=False), HIDDEN)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    def theirs(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (HIDDEN,), weight, 1e-5)

    output, gradients, kept = results(ours, x, weight)
    expected, their_gradients, their_kept = results(theirs, x, weight)
    assert torch.equal(output, expected)
    _, exact, _ = results(lambda x, weight: theirs(x, weight), x.double(), weight.double())
    assert worst(gradients, exact) <= 2 * worst(their_gradients, exact)
    assert [gradient.dtype for gradient in gradients] == [dtype, dtype]
    assert kept == 4 * ROWS and their_kept >= 4 * ROWS * HIDDEN


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_and_its_gradient_are_torch_s_to_the_bit(dtype):
    def theirs(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    torch.manual_seed(0)
    x = torch.randn(ROWS, 1, 2 * HIDDEN).to(dtype)
    output, gradients, kept = results(SwiGLU(), x)
    expected, their_gradients, their_kept = results(theirs, x)
    assert torch.equal(output, expected) and torch.equal(gradients[0], their_gradients[0])
    assert kept == 0 and their_kept == expected.nbytes


def test_triton_s_operations_are_taken_on_cuda_where_they_can_be_and_else_refused_in_a_sentence(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)

    def refused(device: torch.device) -> str:
        with pytest.raises(UserError) as caught:
            choose_small_ops("triton", device)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert choose_small_ops("auto", cpu) == choose_small_ops("torch", gpu) == SmallOps()
    monkeypatch.setattr(choice, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    assert choose_small_ops("auto", gpu) == SmallOps()
    assert refused(gpu) == "model.small_ops is triton, but triton is not installed; set it to auto"
    monkeypatch.setattr(choice, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: name)))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "but that needs a CUDA device, of which there is none" in refused(cpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    assert choose_small_ops("auto", gpu) == SmallOps()
    assert "but that needs compute capability 8.0 and T4 has less" in refused(gpu)
