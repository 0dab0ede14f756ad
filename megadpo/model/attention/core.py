"""Attention over a packed stream in which responses share their prompt; fills Megatron's core_attention slot.

Every segment of the stream attends causally to itself and, where it has one, wholly to its shared prompt. The backend that
computes it is chosen once, by backends.py.
Under context parallelism a rank has the queries of its part of the stream only, or its share of the heads of all of it:
parallel/context.py.

Axes: T stream tokens, A query heads and K key-value heads of this tensor rank, D head dimension, of which values may have
another one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megadpo.data.batches.halves import PairHalf
from megadpo.data.batches.micro_batch import MicroBatch, Segment, ShardSegment, StreamShard
from megadpo.model.attention.base import AttentionBackend
from megadpo.model.attention.chunks import in_chunks
from megadpo.model.attention.prompt_kv import PromptKeys
from megadpo.model.router_load import RouterWatch, token_weights
from megadpo.parallel.context import gathered_stream, heads_of_stream, stream_of_heads
from megadpo.platform.device import compute_device


@dataclass
class StreamParams(PackedSeqParams):
    """What one forward pass hands to every layer, through Megatron's packed_seq_params slot.

    qkv_format stays None, so that Megatron neither reshapes q, k, v nor applies its own packed rope.

    Attributes:
        prepared: by window and chunk, what the attention backend prepared for the layers that have these.
        number: of the micro-batch in the step.
        watch: what records the routers' choices, where the model has experts.
        weights_T: see `token_weights`.
        prompt_keys: keys and values of shared prompts that the first half of a micro-batch keeps for the second.
        rotate: turns queries [T, A, D] and keys [T, K, D] by their tokens' positions, in a layer that is counted from 0 over
            the whole model, where Megatron has not done it; and does what else positions, or being turned, decide.
    """

    micro_batch: MicroBatch | None = None
    prepared: dict[Hashable, Any] = field(default_factory=dict)
    number: int = 0
    watch: RouterWatch | None = None
    weights_T: Tensor | None = None
    prompt_keys: PromptKeys | None = None
    rotate: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None

    def token_weights(self) -> Tensor:
        """`router_load.token_weights` of the micro-batch, made once for all layers."""
        if self.weights_T is None:
            assert self.micro_batch is not None
            self.weights_T = token_weights(self.micro_batch)
        return self.weights_T

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of `make`, called once for all layers that have the same key."""
        if key not in self.prepared:
            self.prepared[key] = make()
        return self.prepared[key]


class GroupAttention(MegatronModule):
    """core_attention: query [T, 1, A, D], key and value [T, 1, K, D] -> [T, 1, A * D].

    Attributes:
        softmax_offset: this tensor rank's sinks [A], where the model has them; else None.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        *unused: Any,
        reaches: Sequence[tuple[int | None, int | None]],
        scale: float,
        backend: AttentionBackend,
        context_method: str | None = None,
        softcap: float | None = None,
        has_sinks: bool = False,
        rotates: bool = True,
        **also_unused: Any,
    ) -> None:
        """`reaches` has one entry a layer of the whole model, as `ModelShape.reaches`; `layer_number` counts from 1 over it.

        `scale` is what scores are multiplied by before their softmax. `context_method` says how micro-batches of
        which this rank holds a part are attended to: "ulysses" or "allgather".
        `softcap` and `has_sinks`: `attention_softcap` and `attention_sinks` of the model's shape.
        `rotates`: queries and keys are turned here, where Megatron has not done it; else they come turned.
        """
        super().__init__(config=config)
        self.layer_number = layer_number
        self.window, self.chunk = reaches[layer_number - 1]
        self.context_method = context_method
        self.backend = backend
        self.softmax_scale = scale  # Megatron hands over a `softmax_scale` of its own
        self.softcap, self.rotates = softcap, rotates
        self.softmax_offset: torch.nn.Parameter | None = None
        if has_sinks:
            # Where Megatron does not leave the device to torch, it is the one that is computed on.
            device = None if config.use_cpu_initialization else compute_device()
            num_heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = torch.nn.Parameter(torch.empty(num_heads, dtype=config.params_dtype, device=device))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Any = None,
        packed_seq_params: StreamParams | None = None,
    ) -> Tensor:
        assert packed_seq_params is not None and packed_seq_params.micro_batch is not None
        micro_batch, (query, key, value) = packed_seq_params.micro_batch, (x.squeeze(1) for x in (query, key, value))
        if self.rotates and packed_seq_params.rotate is not None:
            query, key = packed_seq_params.rotate(query, key, self.layer_number - 1)
        if micro_batch.shard is None:
            output = self._attend(query, key, value, micro_batch.segments, packed_seq_params, self.softmax_offset)
        elif isinstance(micro_batch.shard, PairHalf):
            assert packed_seq_params.prompt_keys is not None
            key, value = packed_seq_params.prompt_keys.passed(self.layer_number, micro_batch.shard, key, value)
            output = self._attend(query, key, value, micro_batch.shard.segments, packed_seq_params, self.softmax_offset)
        elif self.context_method == "ulysses":
            query, key, value = self._own_heads(query, key, value, micro_batch.shard)
            output = self._attend(query, key, value, micro_batch.segments, packed_seq_params, self._own_sinks())
            output = heads_of_stream(output, micro_batch.shard)
        else:
            assert self.context_method == "allgather"
            gather = functools.partial(gathered_stream, shard=micro_batch.shard)
            key, value = _side_by_side(gather, 1, key, value)
            output = self._attend(query, key, value, micro_batch.shard.segments, packed_seq_params, self.softmax_offset)
        return output.flatten(1).unsqueeze(1)

    def _own_heads(self, query: Tensor, key: Tensor, value: Tensor, shard: StreamShard) -> list[Tensor]:
        """This context rank's share of the heads, over the whole stream; where key-value heads are too few for a share,
        each rank gets the one that its query heads read."""
        num_ranks = parallel_state.get_context_parallel_world_size()
        if key.shape[1] < num_ranks:
            key, value = (x.repeat_interleave(num_ranks // key.shape[1], dim=1) for x in (key, value))
        by_rank = [x.unflatten(1, (num_ranks, -1)) for x in (query, key, value)]
        # [T, C, ...] of the tokens held -> [all T, 1, ...]: of every token the row that is this rank's.
        return [x.squeeze(1) for x in _side_by_side(lambda rows: stream_of_heads(rows, shard), 2, *by_rank)]

    def _own_sinks(self) -> Tensor | None:
        """Those of the heads that `_own_heads` gives."""
        if self.softmax_offset is None:
            return None
        num_ranks = parallel_state.get_context_parallel_world_size()
        return self.softmax_offset.chunk(num_ranks)[parallel_state.get_context_parallel_rank()]

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Sequence[Segment | ShardSegment],
        stream: StreamParams,
        sinks_A: Tensor | None,
    ) -> Tensor:
        """[T, A, D of the values], from query [T, A, D], key and value [stream tokens, K, D]."""
        prepared = stream.once(
            (self.window, self.chunk),
            lambda: self.backend.prepare(in_chunks(segments, self.chunk), self.window, key),
        )
        return self.backend.attend(query, key, value, prepared, self.softmax_scale, self.softcap, sinks_A)


def _side_by_side(exchange: Callable[[Tensor], Tensor], dim: int, *tensors: Tensor) -> list[Tensor]:
    """What one `exchange` makes of tensors whose axes from `dim` on differ; these are one axis meanwhile."""
    flat = [x.flatten(dim) for x in tensors]
    exchanged = exchange(torch.cat(flat, dim=dim)).split([x.shape[dim] for x in flat], dim=dim)
    return [part.unflatten(dim, x.shape[dim:]) for part, x in zip(exchanged, tensors, strict=True)]
