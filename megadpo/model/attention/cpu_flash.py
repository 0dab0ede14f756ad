"""Attention of a packed stream on the CPU by torch's flash kernel, block by block and batch by batch (cpu_blocks.py).

The kernel gives each block's output with the logarithm of its softmax's denominator, by which outputs over different keys
are merged into one. Its backward needs only the merged two, whatever the other keys were, so that each block goes back
alone (as in ring attention, arXiv:2310.01889). A softcap, which that kernel lacks, is computed by explicit.py in its place.

Axes: T queries, S keys of the stream, A query heads, K key-value heads, J query heads that share a key-value head, D head
dimension; N queries and M keys of a block; B units of a batch, L and M their queries and keys with padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megadpo.data.batches.micro_batch import Segment, ShardSegment
from megadpo.model.attention.base import AttentionBackend, AttentionNeeds
from megadpo.model.attention.cpu_blocks import Block, Blocks, Padded, PaddedBatch, Range, blocks_of
from megadpo.model.attention.explicit import explicit_backward, explicit_forward
from megadpo.model.attention.head_dims import cut_to, of_one_dim
from megadpo.model.attention.sinks import sink_gradient, with_sinks

# The operations below scaled_dot_product_attention: that neither gives the log-sum-exp nor takes another's.
_forward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


class Kernel(NamedTuple):
    """What computes a block or a batch: torch's two operations, or two that take and give the same."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


class CpuFlashBackend:
    """torch's CPU flash kernel over blocks and batches, without a copy of any key and without a large mask."""

    name = "cpu_flash"

    def why_not(self, needs: AttentionNeeds) -> str | None:
        """On other devices, or where this torch does not have the operations by their names."""
        if needs.device.type != "cpu":
            return f"that is for CPUs and this run computes on {needs.device.type}"
        has_kernel = _forward is not None and _backward is not None
        return None if has_kernel else f"torch {torch.__version__} does not have that kernel"

    def prepare(self, segments: Sequence[Segment | ShardSegment], window: int | None, key: Tensor) -> Blocks:
        """See `blocks_of`."""
        return blocks_of(segments, window, key.dtype)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prepared: Blocks,
        scale: float,
        softcap: float | None = None,
        sinks_A: Tensor | None = None,
    ) -> Tensor:
        """[T, A, D of the values], from query [T, A, D], key and value [S, K, D] on the CPU."""
        kernel = Kernel(_forward, _backward)
        if softcap is not None:
            kernel = Kernel(*(functools.partial(half, softcap=softcap) for half in (explicit_forward, explicit_backward)))
        output = _BlockAttention.apply(*of_one_dim(query, key, value), sinks_A, prepared, scale, kernel)
        return cut_to(output, value.shape[2])


class _BlockAttention(torch.autograd.Function):
    """One node of autograd for the whole stream; keeps what a flash kernel keeps: q, k, v, output and log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks_A: Tensor | None,
        blocks: Blocks,
        scale: float,
        kernel: Kernel,
    ) -> Tensor:
        wide = _wide(query.dtype)  # what is summed up over blocks is rounded once, at the end
        output = query.new_empty(query.shape, dtype=wide)
        lse_TA = query.new_empty(query.shape[:2], dtype=wide)
        call = functools.partial(kernel.forward, scale=scale)
        for batch in blocks.batches:
            _forward_batch(query, key, value, batch, call, output, lse_TA)
        for block in blocks.blocks:
            _forward_block(query, key, value, block, call, output, lse_TA)
        if sinks_A is not None:
            output, lse_TA = with_sinks(output, lse_TA, sinks_A)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse_TA, sinks_A)
        ctx.blocks, ctx.call = blocks, functools.partial(kernel.backward, scale=scale)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse_TA, sinks_A = ctx.saved_tensors
        wide = _wide(query.dtype)
        d_query = query.new_empty(query.shape, dtype=wide)
        d_key, d_value = key.new_zeros(key.shape, dtype=wide), value.new_zeros(value.shape, dtype=wide)
        saved, gradients = (query, key, value, output, lse_TA), (d_query, d_key, d_value)
        for batch in ctx.blocks.batches:
            _backward_batch(d_output, saved, batch, ctx.call, gradients)
        for block in ctx.blocks.blocks:
            _backward_block(d_output, saved, block, ctx.call, gradients)
        d_sinks = None
        if sinks_A is not None:
            d_sinks = sink_gradient(d_output, output, lse_TA, sinks_A).sum(0).to(sinks_A.dtype)
        return *(gradient.to(query.dtype) for gradient in gradients), d_sinks, None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _grouped(rows_NAD: Tensor, num_key_value_heads: int) -> Tensor:
    """A view [K, J, N, D] of [N, A, D]."""
    return rows_NAD.unflatten(1, (num_key_value_heads, -1)).permute(1, 2, 0, 3)


def _spread(rows_MKD: Tensor, num_sharing: int) -> Tensor:
    """A view [K, J, M, D] of [M, K, D]: every query head of a group reads the same keys."""
    return rows_MKD.transpose(0, 1)[:, None].expand(-1, num_sharing, -1, -1)


def _rows(tensor: Tensor, ranges: tuple[Range, ...]) -> Tensor:
    return torch.cat([tensor[start:end] for start, end in ranges]) if len(ranges) > 1 else tensor[slice(*ranges[0])]


def _block_operands(query: Tensor, key: Tensor, value: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    num_sharing = query.shape[1] // key.shape[1]
    keys, values = (_spread(_rows(x, block.keys), num_sharing) for x in (key, value))
    return _grouped(query[slice(*block.queries)], key.shape[1]), keys, values


def _forward_block(
    query: Tensor, key: Tensor, value: Tensor, block: Block, call: Callable[..., Any], output: Tensor, lse_TA: Tensor
) -> None:
    operands = _block_operands(query, key, value, block)
    new_KJND, new_lse_KJN = call(*operands, 0.0, block.is_causal, attn_mask=block.mask)
    new, new_lse = new_KJND.permute(2, 0, 1, 3).flatten(1, 2), new_lse_KJN.permute(2, 0, 1).flatten(1)
    there, lse = output[slice(*block.queries)], lse_TA[slice(*block.queries)]
    if block.is_first:
        there.copy_(new)
        lse.copy_(new_lse)
    else:
        there.lerp_(new.to(there.dtype), torch.sigmoid(new_lse - lse)[..., None])
        torch.logaddexp(lse, new_lse, out=lse)


def _backward_block(
    d_output: Tensor,
    saved: tuple[Tensor, ...],
    block: Block,
    call: Callable[..., Any],
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    query, key, value, output, lse_TA = saved
    operands, queries = _block_operands(query, key, value, block), slice(*block.queries)
    num_heads = key.shape[1]
    new_query, *new_keys = call(
        _grouped(d_output[queries], num_heads),
        *operands,
        _grouped(output[queries], num_heads),
        lse_TA[queries].unflatten(1, (num_heads, -1)).permute(1, 2, 0),
        0.0,
        block.is_causal,
        attn_mask=block.mask,
    )
    d_query, new_query = gradients[0][queries], new_query.permute(2, 0, 1, 3).flatten(1, 2)
    d_query.copy_(new_query) if block.is_first else d_query.add_(new_query)
    for gradient, new_KJMD in zip(gradients[1:], new_keys, strict=True):
        new = _shared(new_KJMD).transpose(0, 1)
        at = 0
        for start, end in block.keys:
            gradient[start:end] += new[at : at + end - start]
            at += end - start


def _shared(gradient_KJMD: Tensor) -> Tensor:
    """[K, M, D]: what the query heads of a group give their keys, added up."""
    if gradient_KJMD.shape[1] == 1:
        return gradient_KJMD[:, 0]
    return gradient_KJMD.sum(1, dtype=_wide(gradient_KJMD.dtype))


def _batch_operands(query: Tensor, key: Tensor, value: Tensor, batch: PaddedBatch) -> list[Tensor]:
    """[B, A, L, D] and twice [B, A, M, D]."""
    num_sharing = query.shape[1] // key.shape[1]
    operands = [_in_batch(query, batch.queries)]
    for rows in (key, value):
        padded_BKMD = _in_batch(rows, batch.keys)
        operands.append(padded_BKMD if num_sharing == 1 else padded_BKMD.repeat_interleave(num_sharing, dim=1))
    return operands


def _in_batch(rows: Tensor, places: Padded) -> Tensor:
    """[B, heads, L, D] of [stream, heads, D]."""
    return rows.index_select(0, places.index).unflatten(0, places.is_padding.shape).transpose(1, 2)


def _forward_batch(
    query: Tensor, key: Tensor, value: Tensor, batch: PaddedBatch, call: Callable[..., Any], output: Tensor, lse_TA: Tensor
) -> None:
    operands = _batch_operands(query, key, value, batch)
    new_BALD, new_lse_BAL = call(*operands, 0.0, batch.mask is None, attn_mask=batch.mask)
    for there, new in ((output, new_BALD), (lse_TA, new_lse_BAL)):
        there.index_copy_(0, batch.queries.stream, _real(new, batch.queries).to(there.dtype))


def _real(padded: Tensor, places: Padded) -> Tensor:
    """[rows that are no padding, heads, …] of [B, heads, L, …]."""
    return padded.transpose(1, 2).flatten(0, 1).index_select(0, places.real)


def _backward_batch(
    d_output: Tensor,
    saved: tuple[Tensor, ...],
    batch: PaddedBatch,
    call: Callable[..., Any],
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    query, key, value, output, lse_TA = saved
    # With a denominator of infinity, padding has weights of zero, and so no gradient.
    lse_BAL = _in_batch(lse_TA, batch.queries).masked_fill(batch.queries.is_padding[:, None], torch.inf)
    new_query, *new_keys = call(
        _in_batch(d_output, batch.queries),
        *_batch_operands(query, key, value, batch),
        _in_batch(output, batch.queries),
        lse_BAL,
        0.0,
        batch.mask is None,
        attn_mask=batch.mask,
    )
    gradients[0].index_copy_(0, batch.queries.stream, _real(new_query, batch.queries).to(gradients[0].dtype))
    for gradient, new_BAMD in zip(gradients[1:], new_keys, strict=True):
        new = _real(new_BAMD, batch.keys).unflatten(1, (key.shape[1], -1)).sum(2, dtype=gradient.dtype)
        gradient.index_add_(0, batch.keys.stream, new)


BACKEND: AttentionBackend = CpuFlashBackend()
