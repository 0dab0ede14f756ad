"""The gated delta rule over packed streams with shared prompts is the recurrent definition, sequence by sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megadpo.data.batches.micro_batch import Segment
from megadpo.errors import UserError
from megadpo.model.linear_attention.by_inputs import keeping_inputs
from megadpo.model.linear_attention.chunks import Chunks, Contexts
from megadpo.model.linear_attention.delta_rule import gated_delta_rule
from megadpo.model.linear_attention.gated_delta_net import CausalConvolution
from megadpo.model.linear_attention.kernels import FlaDeltaRule, choose_delta_rule

SEGMENTS = (
    Segment(0, 13),  # a prompt of several chunks, the last of them short
    Segment(13, 21, 0, 13),
    Segment(21, 22, 0, 13),
    Segment(22, 24),  # one that is shorter than what the convolution sees
    Segment(24, 33, 22, 24),
    Segment(33, 33, 22, 24),  # an empty response
    Segment(33, 50),  # a sequence by itself
    Segment(50, 53),  # padding
)
NUM_TOKENS, KEY_HEADS, VALUE_HEADS, K, V, CHUNK = 53, 2, 4, 5, 3, 4
CPU = torch.device("cpu")


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Queries, keys, values, logarithms of decays, rates."""
    torch.manual_seed(0)
    heads = (KEY_HEADS, KEY_HEADS, VALUE_HEADS)
    rows = [torch.randn(NUM_TOKENS, *size, dtype=torch.float64) for size in zip(heads, (K, K, V), strict=True)]
    decays, rates = (torch.randn(NUM_TOKENS, VALUE_HEADS, dtype=torch.float64) for _ in range(2))
    return tuple(x.to(dtype).requires_grad_() for x in (*rows, -decays.exp(), rates.sigmoid()))


def by_definition(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, rate: Tensor) -> Tensor:
    """Token by token, of each segment behind its prompt: the state from which transformers' recurrent rule starts."""
    repeats = value.shape[1] // key.shape[1]
    query, key = ((x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(repeats, 1) for x in (query, key))
    found: list[Tensor] = []
    for segment in SEGMENTS:
        state = value.new_zeros(value.shape[1], key.shape[2], value.shape[2])
        tokens = [*range(segment.prompt_start, segment.prompt_end), *range(segment.start, segment.end)]
        for place, t in enumerate(tokens):
            state = state * log_decay[t].exp()[:, None, None]
            seen = torch.einsum("hkv,hk->hv", state, key[t])
            state = state + torch.einsum("hk,hv->hkv", key[t], rate[t][:, None] * (value[t] - seen))
            if place >= segment.prompt_end - segment.prompt_start:
                found.append(torch.einsum("hkv,hk->hv", state, query[t]) / K**0.5)
    return torch.stack(found)


def kernel_by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Holds to the contract of fla's `chunk_gated_delta_rule`: transformers' own recurrent rule, a sequence at a time."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    assert use_qk_l2norm_in_kernel and query.shape[:3] == value.shape[:3] and cu_seqlens[-1] == query.shape[1]
    outputs, states = [], []
    for number, (start, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        of_sequence = (x[:, start:end].float() for x in (query, key, value, g, beta))
        names = ("query", "key", "value", "g", "beta")
        output, state = torch_recurrent_gated_delta_rule(
            **dict(zip(names, of_sequence, strict=True)),
            initial_state=None if initial_state is None else initial_state[number : number + 1],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        outputs.append(output)
        states.append(state)
    return torch.cat(outputs, 1), torch.cat(states) if output_final_state else None


def outputs_and_gradients(rule: Any, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    leaves = inputs(dtype)
    output = rule(*leaves)
    torch.manual_seed(1)
    output.backward(torch.randn(output.shape, dtype=torch.float64).to(dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("chunk", [1, CHUNK, 64])
def test_chunks_give_what_the_recurrent_definition_gives_forward_and_backward(chunk: int) -> None:
    chunks = Chunks.of(SEGMENTS, NUM_TOKENS, CPU, size=chunk)
    ours = outputs_and_gradients(lambda *leaves: gated_delta_rule(*leaves, chunks))
    theirs = outputs_and_gradients(by_definition)
    assert len(ours) == 6
    for own, other in zip(ours, theirs, strict=True):
        assert float((own - other).norm() / other.norm()) <= 1e-12


def test_fla_s_kernel_is_called_so_that_it_gives_that_too() -> None:
    rule = FlaDeltaRule(kernel_by_definition)
    turns = rule.prepare(SEGMENTS, NUM_TOKENS, CPU)
    ours = outputs_and_gradients(lambda *leaves: rule.outputs(*leaves, turns), torch.float32)
    theirs = outputs_and_gradients(by_definition)
    for own, other in zip(ours, theirs, strict=True):
        assert float((own - other).norm() / other.norm()) <= 1e-5


def test_the_convolution_of_a_response_sees_its_prompt_s_last_tokens_and_nothing_else_does() -> None:
    torch.manual_seed(0)
    columns, kernel = 6, 4
    convolution = CausalConvolution(columns, kernel, dtype=torch.float64)
    x = torch.randn(NUM_TOKENS, columns, dtype=torch.float64)
    torch.nn.init.normal_(convolution.weight)
    found = convolution(x, Contexts.of(SEGMENTS, NUM_TOKENS, CPU, kernel - 1))
    for segment in SEGMENTS:
        tokens = [*range(segment.prompt_start, segment.prompt_end), *range(segment.start, segment.end)]
        padded = F.pad(x[tokens].t(), (kernel - 1, 0))
        whole = F.conv1d(padded[None], convolution.weight, groups=columns)[0].t()
        assert torch.allclose(found[segment.start : segment.end], whole[segment.prompt_end - segment.prompt_start :])


def test_only_inputs_are_kept_and_gradients_of_frozen_ones_are_not_made() -> None:
    kept: list[Tensor] = []
    a, b = torch.randn(5, requires_grad=True), torch.randn(5)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        result = keeping_inputs(lambda x, y: (x.sigmoid() * y.exp()).tanh(), a, b)
    assert {x.data_ptr() for x in kept} == {a.data_ptr(), b.data_ptr()}
    result.sum().backward()
    expected = torch.autograd.grad((a.sigmoid() * b.exp()).tanh().sum(), a)[0]
    assert torch.equal(a.grad, expected) and b.grad is None


def test_fla_is_refused_where_it_cannot_be_had() -> None:
    assert choose_delta_rule("auto", CPU, torch.float32)[0] == "torch"
    with pytest.raises(UserError, match=r"model.linear_attention is fla, but that needs a CUDA device"):
        choose_delta_rule("fla", CPU, torch.bfloat16)
