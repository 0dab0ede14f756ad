"""`train.recompute: small`: not a bit of a gradient changes, and of cheap operations only the inputs are kept."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megadpo.model import offload
from megadpo.model.attention.sequences import sequences_of
from megadpo.model.attention.varlen import VarlenBackend
from megadpo.model.offload import Files, Offloader
from megadpo.model.recompute import Recomputer, is_remembering, recomputable, remember
from tests.helpers.attention import SHAPES, operands, stream
from tests.helpers.models import VOCAB_SIZE, random_groups
from tests.helpers.worlds import run_world
from tests.unit.model.recompute_worker import Case, Kept, kept

HIDDEN, FFN, HEADS, KEY_HEADS, HEAD_DIM = 48, 80, 4, 2, 16
SETTINGS = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": HEAD_DIM,
}

PACKED = (HEADS + 2 * KEY_HEADS) * HEAD_DIM
LEFT = 2 * HIDDEN + PACKED + HEADS * HEAD_DIM + 2 * FFN
"""What is kept of a token of a layer, in numbers of the model's dtype: the stream before each norm, the packed projection,
attention's output, gate and up."""
NORMS = 2 * HIDDEN
QUERY_COPY = HEADS * HEAD_DIM
ROTATED = (HEADS + KEY_HEADS) * HEAD_DIM
ROPE_OF_TORCH = ROTATED + 4 * HEAD_DIM
"""Megatron's rope by torch's operations: its results, and a cosine and a sine for queries and keys each."""
FLOATS = 2 + HEADS + KEY_HEADS + HEADS
"""A number for each row of each norm, and attention's log-sum-exp."""


def of_a_layer(small_ops: str, cases: list[Kept], dtype: torch.dtype) -> float:
    """Numbers of the dtype that a token of a layer keeps, from a stage of one layer and one of two."""
    one, two = cases
    floats = FLOATS * torch.float32.itemsize
    return ((two.num_bytes - one.num_bytes) / one.num_tokens - floats) / dtype.itemsize


def check(small_ops: str, dtypes: list[torch.dtype], num_groups: int, everything: int, left: int, again: int) -> None:
    """Numbers a token of a layer keeps with `none` and with `small`, and operations that it computes again."""
    ways = [(dtype, how) for dtype in dtypes for how in ("none", "small")]
    cases = [Case(how, num_layers, dtype, small_ops) for dtype, how in ways for num_layers in (1, 2)]
    found = run_world(1, kept, SETTINGS, random_groups(num_groups, seed=3), cases)[0]
    for number, dtype in enumerate(dtypes):
        both = found[4 * number : 4 * number + 2], found[4 * number + 2 : 4 * number + 4]
        assert [of_a_layer(small_ops, cases, dtype) for cases in both] == [everything, left]
        assert [case.num_recomputed for case in both[1]] == [again, 2 * again]
        # The norms before the MLPs, and those of the next layers or of the stage; not the first one.
        assert [case.num_joined for cases in both for case in cases] == ([2, 4, 2, 4] if small_ops == "triton" else [0] * 4)
        for none, small in zip(*both, strict=True):
            assert none.gradients.keys() == small.gradients.keys()
            assert all(torch.equal(small.gradients[name], gradient) for name, gradient in none.gradients.items())


def test_a_layer_keeps_the_inputs_of_its_norms_and_of_swiglu_and_not_a_bit_changes():
    left = LEFT + ROPE_OF_TORCH
    # Two norms, SwiGLU, and the copy of the queries for their norm.
    check("torch", [torch.float32, torch.bfloat16], 5, left + NORMS + FFN + QUERY_COPY, left, 4)


@pytest.mark.slow
def test_where_a_kernel_of_ours_rotates_queries_and_keys_are_not_kept_either():
    if importlib.util.find_spec("triton") is None or torch.cuda.is_available():
        pytest.skip("Triton's interpreter is not to be had")
    # And rope twice, with the norms before it, which read the heads where they lie.
    check("triton", [torch.float32], 1, LEFT + NORMS + FFN + ROTATED, LEFT, 7)


class Pass(torch.nn.Module):
    """A stage whose forward pass is `function`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.decoder = SimpleNamespace(input_tensor=None)

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def followed(function: Callable[..., Any], offloader: Offloader | None = None) -> tuple[Pass, Recomputer]:
    model, recomputer = Pass(function), Recomputer(offloader)
    if offloader is not None:
        offloader.follow(model)
    recomputer.follow(model)
    return model, recomputer


def is_gone(storage: int) -> bool:
    """Whether the storage of this weak reference is freed."""
    return bool(torch.UntypedStorage._expired(storage))


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    function(leaf).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


X = torch.linspace(0.5, 1.5, 64).view(8, 8)


def test_a_result_goes_and_comes_again_as_often_as_it_is_read_and_views_of_it_too():
    results: list[int] = []

    def function(x: Tensor) -> Tensor:
        result = recomputable(torch.sin, x)
        results.append(result.untyped_storage()._weak_ref())
        return result.square().sum() + (result.t()[1:5, ::2] ** 3).sum()

    expected = gradient(function, X)
    model, recomputer = followed(function)
    leaf = X.clone().requires_grad_()
    loss = model(leaf)
    assert is_gone(results[-1]), "square and cube save it, and nothing else holds it"
    loss.backward()
    assert torch.equal(leaf.grad, expected) and recomputer.num_recomputed == 2


def test_a_result_of_results_is_made_from_what_the_first_one_was_made_of():
    def function(x: Tensor) -> Tensor:
        return recomputable(torch.cos, recomputable(torch.sin, x)).square()

    kept_tensors: list[Tensor] = []
    model, recomputer = followed(function)
    recomputer.keep = lambda tensor: kept_tensors.append(tensor) or tensor
    assert torch.equal(gradient(model, X), gradient(function, X))
    # Only x is; the square reads both operations, the cosine the sine.
    assert len({tensor.data_ptr() for tensor in kept_tensors}) == 1
    assert recomputer.num_recomputed == 3


class InBuffer(torch.autograd.Function):
    """`function(x)` in memory that is given, with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], buffer: np.ndarray) -> Tensor:
        return torch.from_numpy(buffer).copy_(function(x))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


def test_what_lies_where_a_result_was_is_not_taken_for_it():
    def function(x: Tensor) -> Tensor:
        total = x.sum()
        for number in range(20):
            buffer = np.empty(x.shape, np.float32)
            address = recomputable(lambda x, at=buffer: InBuffer.apply(x, torch.sin, at), x).data_ptr()  # and is gone
            other = InBuffer.apply(x, lambda x, by=number: x + by, buffer)
            assert other.data_ptr() == address
            total = total + other.square().sum()
        return total

    model, recomputer = followed(function)
    assert torch.equal(gradient(model, X), gradient(function, X)) and recomputer.num_recomputed == 0


def test_a_result_that_was_written_to_is_kept():
    def function(x: Tensor) -> Tensor:
        result = recomputable(torch.sin, x)
        return result.mul_(2).square()

    model, recomputer = followed(function)
    assert torch.equal(gradient(model, X), gradient(function, X)) and recomputer.num_recomputed == 0


def test_one_that_was_written_to_before_it_was_a_result_is_not():
    def function(x: Tensor) -> Tensor:
        return recomputable(lambda x: x.sin().mul_(2), x).square()

    model, recomputer = followed(function)
    assert torch.equal(gradient(model, X), gradient(function, X)) and recomputer.num_recomputed == 1


def test_a_view_is_not_made_again():
    def function(x: Tensor) -> Tensor:
        return recomputable(torch.t, x * 2).square()

    model, recomputer = followed(function)
    assert torch.equal(gradient(model, X), gradient(function, X)) and recomputer.num_recomputed == 0


def test_nothing_is_remembered_without_gradients_or_outside_of_a_pass_or_after_one_that_failed():
    seen: list[bool] = []

    def function(x: Tensor, fails: bool) -> Tensor:
        seen.append(is_remembering())
        result = recomputable(torch.sin, x).square()
        if fails:
            raise RuntimeError("as it happens")
        return result

    model, recomputer = followed(function)
    with torch.no_grad():
        model(X, False)
    with pytest.raises(RuntimeError, match="as it happens"):
        model(X.clone().requires_grad_(), True)
    model(X.clone().requires_grad_(), False)
    assert seen == [False, True, True]
    assert not is_remembering() and not recomputer._known
    leaf = X.clone().requires_grad_()
    recomputable(torch.sin, leaf).square().sum().backward()
    assert recomputer.num_recomputed == 0


def test_a_frozen_result_is_not_remembered():
    def function(x: Tensor) -> Tensor:
        remember(X, torch.sin, X)
        return X * x

    model, recomputer = followed(function)
    gradient(model, X)
    assert recomputer.num_recomputed == 0


def test_a_pass_that_never_goes_back_leaves_nothing_behind():
    results: list[int] = []

    def function(x: Tensor) -> Tensor:
        result = x.exp()  # which saves it
        results.append(result.untyped_storage()._weak_ref())
        return recomputable(torch.sin, result).square()

    model, _ = followed(function)
    gc.disable()
    try:
        model(X.clone().requires_grad_())
        assert is_gone(results[0])
    finally:
        gc.enable()


def test_what_is_not_known_goes_to_the_offloader_and_inputs_come_back_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(offload, "MIN_BYTES", 0)

    def function(x: Tensor) -> Tensor:
        moved = x * 2
        return recomputable(torch.sin, moved).square() * moved

    expected = gradient(function, X)
    offloader = Offloader(Files(tmp_path), 0)
    model, recomputer = followed(function, offloader)
    assert torch.equal(gradient(model, X), expected)
    assert recomputer.num_recomputed == 1
    # `moved`, once, which sine and the product save, and the square.
    assert offloader.num_bytes_moved == 2 * X.nbytes


class Kernel(torch.autograd.Function):
    """Keeps what a kernel for sequences keeps: queries, and keys and values as it was given them."""

    @staticmethod
    def forward(ctx: Any, *operands: Tensor) -> Tensor:
        ctx.save_for_backward(*operands)
        return sum(operand.sum() for operand in operands)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.sin(operand) for operand in ctx.saved_tensors)


def kernel_without_gqa(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=None, window_size=(-1, -1)):
    assert query.shape[1] == key.shape[1]
    return Kernel.apply(query, key, value).expand(query.shape)


@pytest.mark.parametrize("part", [None, 0, 1])
def test_keys_and_values_that_are_copied_for_a_kernel_are_copied_again(monkeypatch, part):
    import torch.nn.attention.varlen

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel_without_gqa)
    segments, num_queries, num_keys = stream(SHAPES["pairs"], part=part)
    query, key, value, _ = operands(num_queries, num_keys, (4, 2), torch.float32)
    backend = VarlenBackend()
    prepared = backend.prepare(segments, None, key)
    assert prepared.keys_G is not None

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return backend.attend(query, key, value, prepared, 0.5)

    def gradients(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(query, key, value).sum(), [query, key, value])

    sizes: dict[int, int] = {}
    model, recomputer = followed(function)
    recomputer.keep = lambda tensor: sizes.update({tensor.data_ptr(): tensor.nbytes}) or tensor
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), gradients(function), strict=True))
    # Of a part of the stream's queries some keys may be left out: the smaller of copies and original is kept.
    num_copied = 2 * len(prepared.keys_G)
    rows = min(num_keys, num_copied)
    assert sum(sizes.values()) == query.nbytes + 2 * rows * 2 * query.shape[2] * 4 + prepared.keys_G.nbytes
    assert recomputer.num_recomputed == (2 if num_copied >= num_keys else 0)


def test_sequences_in_the_stream_s_own_order_are_not_copied_and_not_remembered():
    segments, _, num_keys = stream(SHAPES["pairs"], share_prompts=False)
    _, key, value, _ = operands(num_keys, num_keys, (4, 2), torch.float32)
    sequences = sequences_of(segments, None, num_keys, key.device)
    assert sequences.gathered(key, value) == (key, value)
