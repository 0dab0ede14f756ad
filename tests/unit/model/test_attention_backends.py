"""Every backend of attention gives what its definition gives, forward and backward, whatever the shape of the stream."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megadpo.errors import UserError
from megadpo.model.attention import buckets, flash_attn
from megadpo.model.attention import cpu_blocks as attention_blocks
from megadpo.model.attention.backends import BACKENDS, backend_named, choose_backend, slow_on
from megadpo.model.attention.base import AttentionNeeds
from megadpo.validation.values import CHOICES
from tests.helpers.attention import (
    FOR_SEQUENCES,
    SHAPES,
    TOLERANCES,
    assert_same,
    attend,
    by_definition,
    operands,
    stream,
)


def chosen(requested: str, device: torch.device, dtype: torch.dtype, head_dim: int, **others: Any) -> str:
    return choose_backend(requested, AttentionNeeds(device, dtype, head_dim, **others)).name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 1, 6, 33])
@pytest.mark.parametrize(
    ("backend", "largest_unit"),
    [("cpu_flash", 0), ("cpu_flash", 40), ("cpu_flash", 512), ("buckets", 512), ("sdpa", 512)],
    ids=["blocks", "blocks and batches", "batches", "buckets", "sdpa"],
)
def test_outputs_and_gradients_on_the_cpu(monkeypatch, shape, window, backend, largest_unit):
    monkeypatch.setattr(attention_blocks, "MAX_UNIT", largest_unit)
    for share_prompts, part in ((True, None), (False, None), (True, 0), (True, 1)):
        segments, num_queries, num_keys = stream(SHAPES[shape], share_prompts, part)
        assert_same(backend, segments, operands(num_queries, num_keys, (4, 2), torch.float32), window)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("largest_unit", [0, 512], ids=["blocks", "batches"])
def test_key_value_heads_may_be_fewer_and_dtypes_wider_or_narrower(monkeypatch, dtype, heads, largest_unit):
    monkeypatch.setattr(attention_blocks, "MAX_UNIT", largest_unit)
    segments, num_queries, num_keys = stream(SHAPES["pairs"])
    for window in (None, 6):
        assert_same("cpu_flash", segments, operands(num_queries, num_keys, heads, dtype), window)


def test_narrow_arithmetic_is_no_worse_than_torchs_own(monkeypatch):
    monkeypatch.setattr(attention_blocks, "MAX_UNIT", 64)
    segments, num_queries, num_keys = stream([(200, 90, 130), (20, 10, 12), (25, 10, 8)])
    *inputs, d_output = operands(num_queries, num_keys, (4, 2), torch.bfloat16)
    want = by_definition(*inputs, segments, None)
    exact = (want, *torch.autograd.grad(want, inputs, d_output.double()))
    errors = {}
    for backend in ("cpu_flash", "sdpa"):
        found = attend(backend, *inputs, segments, None)
        ours = (found, *torch.autograd.grad(found, inputs, d_output))
        errors[backend] = [float((a.detach().double() - b.detach()).norm()) for a, b in zip(ours, exact, strict=True)]
    assert all(ours <= 2 * theirs for ours, theirs in zip(errors["cpu_flash"], errors["sdpa"], strict=True)), errors


responses = st.lists(st.integers(1, 30), min_size=1, max_size=4)
streams = st.lists(st.tuples(st.integers(0, 40), responses), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(
    streams,
    st.sampled_from([None, 1, 5, 24]),
    st.sampled_from([0, 16, 48, 512]),
    st.sampled_from([None, 0, 1]),
    st.booleans(),
)
@pytest.mark.slow
def test_any_stream(groups, window, largest_unit, part, share_prompts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_blocks, "MAX_UNIT", largest_unit)
        patch.setattr(attention_blocks, "WINDOW_ROWS", 8)
        segments, num_queries, num_keys = stream([(prompt, *rest) for prompt, rest in groups], share_prompts, part)
        tensors = [x.detach().double().requires_grad_() for x in operands(num_queries, num_keys, (4, 2), torch.float32)]
        assert_same("cpu_flash", segments, tensors, window)


def test_segments_of_about_one_length_are_one_padded_batch_and_the_rest_is_little(monkeypatch):
    lengths = [(40, 20, 22), (40, 21, 20), (39, 20, 20), (300, 100, 90), (5, 1, 1)]
    segments, num_queries, num_keys = stream(lengths)
    prepared = backend_named("buckets").prepare(segments, None, torch.zeros(num_keys, 2, 16))
    assert len(prepared.buckets) < len(segments) / 2
    assert sum(len(bucket.real) for bucket in prepared.buckets) == num_queries
    assert sum(bucket.query_BL.numel() for bucket in prepared.buckets) < 1.2 * num_queries
    assert sorted(prepared.order_T.tolist()) == list(range(num_queries))
    assert any(bucket.mask is None for bucket in prepared.buckets), "prompts by themselves are causal squares"
    monkeypatch.setattr(buckets, "MAX_BATCH", 1)
    alone = backend_named("buckets").prepare(segments, None, torch.zeros(num_keys, 2, 16))
    assert all(len(bucket.query_BL) == 1 for bucket in alone.buckets)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_padded_batches_take_fewer_key_value_heads_and_every_dtype_and_give_padding_no_gradient(monkeypatch, dtype):
    monkeypatch.setattr(buckets, "FILLED", 0.05)  # much padding
    segments, num_queries, num_keys = stream(SHAPES["lists and single answers"])
    for heads in ((4, 4), (6, 2), (3, 1)):
        for window in (None, 6):
            assert_same("buckets", segments, operands(num_queries, num_keys, heads, dtype), window)


def test_scores_far_apart_do_not_overflow():
    segments, num_queries, num_keys = stream([(40, 20, 30), (40, 22, 30), (30, 30, 1)])
    query, *rest = operands(num_queries, num_keys, (4, 2), torch.float32)
    query = (query.detach() * 1000).requires_grad_()
    for largest_unit in (0, 512):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention_blocks, "MAX_UNIT", largest_unit)
            found = attend("cpu_flash", query, *rest[:2], segments, None)
            gradients = torch.autograd.grad(found, [query, *rest[:2]], rest[2])
            assert all(torch.isfinite(tensor).all() for tensor in (found, *gradients))
    want = by_definition(query, *rest[:2], segments, None)
    assert float((found.detach().double() - want.detach()).norm() / want.detach().norm()) < 1e-3


def test_responses_of_a_long_prompt_share_one_rectangle_and_nothing_is_masked():
    segments, *_ = stream([(2000, 300, 500, 400), (600, 100, 100)])
    blocks = attention_blocks.blocks_of(segments, None, torch.float32)
    assert not blocks.batches
    rectangles = [(b.queries, b.keys) for b in blocks.blocks if not b.is_causal]
    assert rectangles == [((2000, 3200), ((0, 2000),)), ((3800, 4000), ((3200, 3800),))]
    assert all(block.mask is None for block in blocks.blocks)


def test_short_groups_of_about_equal_sizes_are_few_calls():
    random = np.random.default_rng(0)
    lengths = [tuple(random.integers(low, high) for low, high in ((80, 120), (30, 60), (30, 60))) for _ in range(40)]
    blocks = attention_blocks.blocks_of(stream(lengths)[0], None, torch.float32)
    assert len(blocks.batches) <= 5 and not blocks.blocks
    padded = sum(batch.queries.is_padding.numel() for batch in blocks.batches)
    assert padded <= 1.2 * sum(sum(some) for some in lengths)


# GPU kernels are not run here. What they are given is held to their contract, written down in plain torch.


def varlen_contract(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    max_queries: int,
    max_keys: int,
    scale: float,
    reach: tuple[int, int],
    softcap: float = 0.0,
) -> Tensor:
    """Sequences one after the other; the last query meets the last key; a query sees `reach` keys before and after its own
    (-1: all); heads of one dimension."""
    assert query.shape[2] == key.shape[2] == value.shape[2]
    assert query_starts.dtype is key_starts.dtype is torch.int32
    assert (query_starts.diff() > 0).all() and (key_starts.diff() > 0).all()
    assert (max_queries, max_keys) == (int(query_starts.diff().max()), int(key_starts.diff().max()))
    assert (int(query_starts[-1]), int(key_starts[-1])) == (len(query), len(key))
    num_sharing = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(num_sharing, dim=1) for x in (key, value))
    outputs = []
    for number in range(len(query_starts) - 1):
        queries, keys = slice(*query_starts[number : number + 2]), slice(*key_starts[number : number + 2])
        scores = torch.einsum("qad,kad->aqk", query[queries], key[keys]) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        num_queries, num_keys = scores.shape[1:]
        places = torch.arange(num_keys) - torch.arange(num_queries)[:, None] - (num_keys - num_queries)
        seen = torch.ones_like(places, dtype=torch.bool)
        for side, sign in zip(reach, (-1, 1), strict=True):
            seen &= (sign * places <= side) if side >= 0 else True
        outputs.append(torch.einsum("aqk,kad->qad", scores.masked_fill(~seen, -torch.inf).softmax(-1), value[keys]))
    return torch.cat(outputs)


def contract_of_torch(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa is (query.shape[1] != key.shape[1])
    return varlen_contract(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def contract_of_torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    assert query.shape[1] == key.shape[1]
    return varlen_contract(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def contract_of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert query.shape[1] == key.shape[1] and is_causal and return_aux is None
    return varlen_contract(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, query.shape[2] ** -0.5, (-1, 0))


OLDER_TORCH = {"2.10": contract_of_torch_2_10, "2.11": contract_of_torch_2_11}


def contract_of_flash_attn(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
):
    assert causal and dropout_p == 0
    reach = (window_size[0], 0)
    return varlen_contract(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, reach, softcap)


def contract_of_flash_attn_2_5(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
):
    raise AssertionError("not called")


class ContractOfTransformerEngine(torch.nn.Module):
    def __init__(self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.1, **others):
        super().__init__()
        assert attention_dropout == 0.0
        self.heads = (num_attention_heads, num_gqa_groups, kv_channels)
        self.scale, self.format = others.pop("softmax_scale"), others.pop("qkv_format")
        assert others == {"attn_mask_type": "padding_causal_bottom_right"}

    def forward(
        self,
        query_layer,
        key_layer,
        value_layer,
        attention_mask=None,
        qkv_format=None,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        attn_mask_type=None,
        window_size=None,
    ):
        assert (qkv_format, attn_mask_type) == ("thd", "padding_causal_bottom_right")
        assert self.heads == (query_layer.shape[1], key_layer.shape[1], query_layer.shape[2])
        starts = (cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv)
        return varlen_contract(query_layer, key_layer, value_layer, *starts, self.scale, window_size).flatten(1)


@pytest.fixture
def gpu_libraries(monkeypatch):
    """Modules that hold to the contracts of the GPU kernels, under the names of these."""
    import torch.nn.attention.varlen

    flash_attn, engine, pytorch = (ModuleType(name) for name in ("flash_attn", "transformer_engine", "pytorch"))
    flash_attn.flash_attn_varlen_func = contract_of_flash_attn
    pytorch.DotProductAttention = ContractOfTransformerEngine
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", contract_of_torch)
    for name, module in (("flash_attn", flash_attn), ("transformer_engine", engine), ("triton", ModuleType("triton"))):
        module.__spec__ = importlib.util.spec_from_loader(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", pytorch)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 1, 6, 33])
@pytest.mark.parametrize("backend", FOR_SEQUENCES)
@pytest.mark.slow
def test_gpu_kernels_are_given_what_makes_them_give_the_definition(gpu_libraries, backend, window, shape):
    for heads, share_prompts, part in (((4, 2), True, None), ((4, 4), False, None), ((6, 2), True, 0), ((4, 2), True, 1)):
        segments, num_queries, num_keys = stream(SHAPES[shape], share_prompts, part)
        assert_same(backend, segments, operands(num_queries, num_keys, heads, torch.float32), window)


@pytest.mark.parametrize("backend", FOR_SEQUENCES)
def test_gpu_kernels_of_one_head_dimension_are_given_values_of_another_one_and_softcaps_where_they_take_them(
    gpu_libraries, backend
):
    softcap = 1.5 if backend == "flash_attn" else None
    for value_dim, part in ((8, None), (24, 1)):
        segments, num_queries, num_keys = stream(SHAPES["pairs"], part=part)
        tensors = operands(num_queries, num_keys, (4, 2), torch.float32, value_dim=value_dim)
        assert_same(backend, segments, tensors, 6, softcap=softcap)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("version", OLDER_TORCH)
@pytest.mark.slow
def test_what_an_older_torch_s_kernel_lacks_is_done_before_the_call(gpu_libraries, monkeypatch, version, heads, shape):
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", OLDER_TORCH[version])
    for share_prompts, part in ((True, None), (False, None), (True, 1)):
        segments, num_queries, num_keys = stream(SHAPES[shape], share_prompts, part)
        for window in (None,) if version == "2.10" else (None, 1, 6):
            assert_same("varlen", segments, operands(num_queries, num_keys, heads, torch.float32), window)


def test_an_older_torch_s_kernel_gets_the_queries_themselves_where_the_scale_is_its_own(gpu_libraries, monkeypatch):
    def seen_query(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        return query

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", seen_query)
    segments, num_queries, num_keys = stream(SHAPES["pairs"])
    query, key, value, _ = operands(num_queries, num_keys, (4, 2), torch.bfloat16)
    backend = backend_named("varlen")
    prepared = backend.prepare(segments, None, key)
    assert backend.attend(query, key, value, prepared, 16**-0.5) is query
    assert torch.equal(backend.attend(query, key, value, prepared, 0.5), query * 2)


def test_keys_are_not_copied_where_no_prompt_is_shared():
    segments, _, num_keys = stream(SHAPES["pairs"], share_prompts=False)
    for name in FOR_SEQUENCES:
        assert backend_named(name).prepare(segments, None, torch.zeros(num_keys, 2, 16)).keys_G is None


def test_the_arguments_are_those_that_the_installed_torch_takes():
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    taken, given_ = (inspect.signature(function).parameters for function in (varlen_attn, contract_of_torch))
    assert {name: taken[name].kind for name in given_} == {name: given_[name].kind for name in given_}
    assert list(taken)[: len(given_) - 3] == list(given_)[: len(given_) - 3]


def test_without_libraries_auto_comes_to_torch_s_kernels_and_to_the_plain_one_last(on_gpu, gpu_libraries, monkeypatch):
    for library in ("flash_attn", "transformer_engine"):
        monkeypatch.delitem(sys.modules, library)
    assert chosen("auto", on_gpu, torch.bfloat16, 128) == "varlen"
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", contract_of_torch_2_10)
    assert chosen("auto", on_gpu, torch.bfloat16, 128, has_windows=True) == "flex"
    monkeypatch.setitem(sys.modules, "triton", None)  # as where it is not installed
    assert chosen("auto", on_gpu, torch.bfloat16, 128, has_windows=True) == "buckets"


@pytest.mark.parametrize("gives_more", [False, True])
def test_version_3_of_flash_attn_goes_before_version_2_on_hopper_only(gpu_libraries, monkeypatch, gives_more):
    def contract_of_version_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        assert options.keys() == {"softmax_scale", "causal", "window_size"}
        starts = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        output = contract_of_flash_attn(q, k, v, *starts, **options)
        return (output, None) if gives_more else output

    third = ModuleType("flash_attn_interface")
    third.__spec__ = importlib.util.spec_from_loader("flash_attn_interface", None)
    third.flash_attn_varlen_func = contract_of_version_3
    monkeypatch.setitem(sys.modules, "flash_attn_interface", third)
    for name in ("flash_attn", "transformer_engine"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(flash_attn, "_has_version_3", flash_attn._has_version_3.__wrapped__)  # not its cache
    for capability, taken in (((9, 0), "flash_attn"), ((8, 0), "varlen"), ((10, 0), "varlen")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, known=capability: known)
        assert chosen("auto", torch.device("cuda", 0), torch.bfloat16, 128) == taken
    monkeypatch.setattr(flash_attn, "_has_version_3", lambda device: True)
    segments, num_queries, num_keys = stream(SHAPES["pairs"])
    assert_same("flash_attn", segments, operands(num_queries, num_keys, (4, 2), torch.float32), 6)


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return torch.device("cuda", 0)


def test_every_name_of_the_tuple_is_a_file_with_the_backend_of_that_name_and_a_choice_of_the_configuration():
    assert [backend_named(name).name for name in BACKENDS] == list(BACKENDS)
    assert CHOICES["model.attention"] == ("auto", *BACKENDS)
    assert backend_named(BACKENDS[-1]).why_not(AttentionNeeds(torch.device("meta"), torch.float64, 3)) is None


def test_on_a_cpu_it_is_the_cpu_kernel_and_others_say_why_not():
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        assert chosen("auto", cpu, dtype, 64) == "cpu_flash"
    assert chosen("sdpa", cpu, torch.float32, 64) == "sdpa"
    for name in FOR_SEQUENCES:
        with pytest.raises(UserError, match=rf"model\.attention is {name}, but that needs a CUDA device.*set it to auto"):
            chosen(name, cpu, torch.bfloat16, 64)


def test_on_a_gpu_it_is_a_kernel_for_sequences_where_dtype_and_heads_allow_it(on_gpu, gpu_libraries, monkeypatch):
    assert chosen("auto", on_gpu, torch.bfloat16, 128) == "flash_attn"
    assert [chosen(name, on_gpu, torch.bfloat16, 128) for name in BACKENDS[1:]] == list(BACKENDS[1:])
    for dtype, head_dim in ((torch.float32, 128), (torch.bfloat16, 20)):
        assert chosen("auto", on_gpu, dtype, head_dim) == "flex"
    assert chosen("auto", on_gpu, torch.bfloat16, 320) == "buckets"
    with pytest.raises(UserError, match=r"model\.attention is buckets, but that is for GPUs"):
        chosen("buckets", torch.device("cpu"), torch.bfloat16, 128)
    with pytest.raises(UserError, match=r"model\.attention is cpu_flash, but that is for CPUs"):
        chosen("cpu_flash", on_gpu, torch.bfloat16, 128)
    with pytest.raises(UserError, match=r"flash_attn, but that computes in bf16 and not in float32"):
        chosen("flash_attn", on_gpu, torch.float32, 128)


def test_windows_are_refused_by_a_torch_whose_kernel_has_none(on_gpu, gpu_libraries, monkeypatch):
    for version, function in OLDER_TORCH.items():
        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", function)
        assert chosen("varlen", on_gpu, torch.bfloat16, 128) == "varlen"
        if version == "2.10":
            with pytest.raises(UserError, match=r"varlen, but that of torch \S+ does not take the sliding windows"):
                chosen("varlen", on_gpu, torch.bfloat16, 128, has_windows=True)
        else:
            assert chosen("varlen", on_gpu, torch.bfloat16, 128, has_windows=True) == "varlen"
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", lambda query, key, value: query)
    with pytest.raises(UserError, match=r"varlen, but that of torch \S+ takes neither window_size nor is_causal"):
        chosen("varlen", on_gpu, torch.bfloat16, 128)


def test_kernels_that_lack_softcaps_or_sinks_are_passed_over_and_refused_in_a_sentence(on_gpu, gpu_libraries, monkeypatch):
    for softcap, sinks, taken in ((True, False, "flash_attn"), (False, True, "flex"), (True, True, "flex")):
        needs = {"has_softcap": softcap, "has_sinks": sinks}
        assert chosen("auto", on_gpu, torch.bfloat16, 128, **needs) == taken
        for name in ("flex", "buckets", "sdpa"):
            assert chosen(name, on_gpu, torch.bfloat16, 128, **needs) == name
        for name in ("cpu_flash", "sdpa"):
            assert chosen(name, torch.device("cpu"), torch.float32, 128, **needs) == name
        for name in ("transformer_engine", "varlen"):
            lacks = "the attention sinks that this model has" if sinks else "the softcap that this model has on"
            with pytest.raises(UserError, match=rf"is {name}, but that does not compute {lacks}.*; set it to auto"):
                chosen(name, on_gpu, torch.bfloat16, 128, **needs)
    with pytest.raises(UserError, match="is flash_attn, but that does not compute the attention sinks"):
        chosen("flash_attn", on_gpu, torch.bfloat16, 128, has_sinks=True)
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", contract_of_flash_attn_2_5)
    assert chosen("auto", on_gpu, torch.bfloat16, 128) == "flash_attn"
    assert chosen("auto", on_gpu, torch.bfloat16, 128, has_softcap=True) == "flex"
    monkeypatch.setitem(sys.modules, "triton", None)  # as where it is not installed
    assert chosen("auto", on_gpu, torch.bfloat16, 128, has_softcap=True) == "buckets"


def test_the_larger_head_dimension_decides(on_gpu, gpu_libraries):
    assert chosen("auto", on_gpu, torch.bfloat16, 192, value_dim=128) == "flash_attn"
    assert chosen("auto", on_gpu, torch.bfloat16, 192, value_dim=320) == "buckets"
    with pytest.raises(UserError, match=r"varlen, but that needs a head dimension of at most 256.*is 320"):
        chosen("varlen", on_gpu, torch.bfloat16, 192, value_dim=320)


def test_a_gpu_that_is_left_with_the_plain_backend_is_said_to_be_slow_and_what_to_install():
    assert "20 times" in (slow_on("cuda", "sdpa") or "") and "install flash-attn" in (slow_on("cuda", "sdpa") or "")
    assert (slow_on("cuda", "buckets") or "").startswith("warning: attention is computed in padded batches (buckets), ")
    assert slow_on("cpu", "sdpa") is slow_on("cuda", "flex") is None


def test_libraries_that_are_not_installed_are_refused_by_name(on_gpu):
    for name, library in (("flash_attn", "flash-attn"), ("transformer_engine", "TransformerEngine")):
        with pytest.raises(UserError, match=f"{library} is not installed"):
            chosen(name, on_gpu, torch.bfloat16, 128)
