"""Context parallelism: the ranks that share a micro-batch's stream, and their collectives.

Every rank holds a shard of the stream (data/batches/context_shard.py) for embeddings, norms, projections, MLPs and head.
Attention needs the keys of other ranks, in one of two ways:

* "ulysses": by all-to-all each rank gets the whole stream for its share of the heads, and afterwards gives the outputs back;
* "allgather": each rank gets all keys and values and attends with its own queries.

The log-probs of a response lie on several ranks: their sums are added up over the ranks before anything else is done
with them, and the gradient of a sum goes back to each rank's own terms once.

Axes: T stream tokens, L those of them that a rank holds, A query heads, K key-value heads, D head dimension, C ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megadpo.data.batches.bin_packing import IntArray
from megadpo.data.batches.context_shard import with_context_shard
from megadpo.data.batches.micro_batch import MicroBatch, StreamShard
from megadpo.data.batches.packed_dataset import PackedDataset
from megadpo.platform.device import compute_device


def local_micro_batches(packing: PackedDataset, group_ids: Sequence[int] | IntArray) -> list[MicroBatch]:
    """This replica's micro-batches out of a step with the groups `group_ids`, with this rank's shards, on its device."""
    return on_device(host_micro_batches(packing, group_ids))


def host_micro_batches(packing: PackedDataset, group_ids: Sequence[int] | IntArray) -> list[MicroBatch]:
    """The same in host memory, pinned where there is a CUDA device; may run on any thread."""
    micro_batches = [with_own_shard(m) for m in packing.micro_batches(group_ids, parallel_state.get_data_parallel_rank())]
    return [micro_batch.pinned() for micro_batch in micro_batches] if compute_device().type == "cuda" else micro_batches


def on_device(micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Micro-batches on this rank's device."""
    return [micro_batch.to(compute_device()) for micro_batch in micro_batches]


def with_own_shard(micro_batch: MicroBatch) -> MicroBatch:
    """The micro-batch with this rank's context shard; itself without context parallelism."""
    num_shards = parallel_state.get_context_parallel_world_size()
    if num_shards == 1:
        return micro_batch
    return with_context_shard(micro_batch, num_shards, parallel_state.get_context_parallel_rank())


def is_first_rank_of_stage() -> bool:
    """Whether this is the first of the tensor and context ranks of its stage and replica, which all have the same sums."""
    return parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.get_context_parallel_rank() == 0


def all_scored(token_statistics: Tensor, micro_batch: MicroBatch) -> Tensor:
    """The head's statistics [1, N held, S] at all N scored positions of the micro-batch, zeros where others hold them."""
    if micro_batch.shard is None:
        return token_statistics
    everywhere = token_statistics.new_zeros(1, len(micro_batch.scored_N), token_statistics.shape[-1])
    return everywhere.index_copy(1, micro_batch.shard.scored_index_N, token_statistics)


def sum_over_context(values: Tensor, micro_batch: MicroBatch) -> Tensor:
    """The sum over the ranks that hold the micro-batch; each rank's own terms get the gradient of the sum, once."""
    return values if micro_batch.shard is None else _Sum.apply(values)


def stream_of_heads(heads_LHD: Tensor, shard: StreamShard) -> Tensor:
    """[L, H, D] of the tokens held -> [T, H / C, D] of the whole stream, in its order, for this rank's H / C heads."""
    num_ranks = parallel_state.get_context_parallel_world_size()
    sent_CLHD = heads_LHD.unflatten(1, (num_ranks, -1)).transpose(0, 1)
    return _AllToAll.apply(sent_CLHD).flatten(0, 1).index_select(0, shard.order)


def heads_of_stream(heads_THD: Tensor, shard: StreamShard) -> Tensor:
    """The inverse: [T, H / C, D] of the whole stream -> [L, H, D] of the tokens held."""
    num_ranks = parallel_state.get_context_parallel_world_size()
    by_rank_THD = torch.empty_like(heads_THD).index_copy(0, shard.order, heads_THD)
    sent_CLHD = by_rank_THD.unflatten(0, (num_ranks, -1))
    return _AllToAll.apply(sent_CLHD).transpose(0, 1).flatten(1, 2)


def gathered_stream(values_LHD: Tensor, shard: StreamShard) -> Tensor:
    """[L, H, D] of the tokens held -> [T, H, D] of the whole stream, in its order."""
    return _AllGather.apply(values_LHD).index_select(0, shard.order)


class _Sum(torch.autograd.Function):
    """Sum over context ranks; every rank is given the gradient of the sum and passes it on to its own terms."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=parallel_state.get_context_parallel_group())
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _AllToAll(torch.autograd.Function):
    """[C, …]: entry c is exchanged with rank c's entry for this rank; its own adjoint."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor) -> Tensor:
        return _all_to_all(sent)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _all_to_all(gradients[0])


def _all_to_all(sent: Tensor) -> Tensor:
    received = torch.empty_like(sent, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, sent.contiguous(), group=parallel_state.get_context_parallel_group())
    return received


class _AllGather(torch.autograd.Function):
    """[L, …] of every rank, concatenated; the gradient of each rank's part is summed over all ranks."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        everything = own.new_empty(dist.get_world_size(group) * len(own), *own.shape[1:])
        dist.all_gather_into_tensor(everything, own.contiguous(), group=group)
        return everything

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        everything = gradients[0].contiguous()
        own = everything.new_empty(len(everything) // dist.get_world_size(group), *everything.shape[1:])
        dist.reduce_scatter_tensor(own, everything, group=group)
        return own
