"""Attention over a packed stream in which responses share their prompt; fills Megatron's core_attention slot.

Every segment of the stream attends causally to itself and, where it has one, wholly to its shared prompt. Keys and
values of prompt and segment are put side by side, so that an ordinary causal kernel with fewer queries than keys
(aligned at the bottom right) does the rest, and its backward adds up the prompt's gradients over the responses.
Under context parallelism a rank has the queries of its part of the stream only, or its share of the heads of all of it:
parallel/context.py.

Axes: T stream tokens, A query heads and K key-value heads of this tensor rank, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megadpo.data.micro_batch import MicroBatch, Part, Piece, Segment
from megadpo.model.routing import RouterWatch, token_weights
from megadpo.parallel.context import gathered_stream, heads_of_stream, stream_of_heads


@dataclass
class StreamParams(PackedSeqParams):
    """Takes a micro-batch, its number in the step and who watches the routers through Megatron's packed_seq_params slot.

    qkv_format stays None, so that Megatron neither reshapes q, k, v nor applies its own packed rope.
    """

    micro_batch: MicroBatch | None = None
    masks: dict[tuple[int, int, int | None], Tensor | None] = field(default_factory=dict)
    number: int = 0
    watch: RouterWatch | None = None
    weights_T: Tensor | None = None

    def token_weights(self) -> Tensor:
        """`routing.token_weights` of the micro-batch, made once for all layers."""
        if self.weights_T is None:
            assert self.micro_batch is not None
            self.weights_T = token_weights(self.micro_batch)
        return self.weights_T

    def mask(self, num_queries: int, num_keys: int, window: int | None, query: Tensor) -> Tensor | None:
        """The mask of a segment of this size, made once for all layers; None where plain causal attention is meant."""
        key = (num_queries, num_keys, window)
        if key not in self.masks:
            mask = segment_mask(num_queries, num_keys, window, query.device)
            if mask is not None and query.device.type == "cpu":
                # The CPU kernel adds its mask: given a boolean one, it would convert it at every layer.
                mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
            self.masks[key] = mask
        return self.masks[key]


def segment_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """Boolean mask [queries, keys], True where a query may look; None for a plain causal square.

    Args:
        num_keys: the last query sees all of them, each one before it one key less.
        window: a query at position p sees keys at positions p - window + 1 .. p (as transformers masks); None: all.
    """
    windowed = window is not None and num_keys > window
    if num_keys == num_queries and not windowed:
        return None
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    if windowed:
        assert window is not None
        mask = mask.triu(num_keys - num_queries - window + 1)
    return mask


class GroupAttention(MegatronModule):
    """core_attention: query [T, 1, A, D], key and value [T, 1, K, D] -> [T, 1, A * D]."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        *unused: Any,
        windows: Sequence[int | None],
        rope_scaling: float,
        context_method: str | None = None,
        **also_unused: Any,
    ) -> None:
        """`windows` has one entry a layer of the whole model; `layer_number` counts from 1 over the whole model.

        `context_method` says how micro-batches of which this rank holds a part are attended to: "ulysses" or "allgather".
        """
        super().__init__(config=config)
        self.window = windows[layer_number - 1]
        self.context_method = context_method
        # Scaling cosine and sine of queries and keys (yarn) is scaling their product by the square.
        self.softmax_scale = rope_scaling**2 / math.sqrt(config.kv_channels)

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
        if micro_batch.part is None:
            output = self._attend(query, key, value, micro_batch.segments, packed_seq_params)
        elif self.context_method == "ulysses":
            query, key, value = self._own_heads(query, key, value, micro_batch.part)
            output = self._attend(query, key, value, micro_batch.segments, packed_seq_params)
            output = heads_of_stream(output, micro_batch.part)
        else:
            assert self.context_method == "allgather"
            key, value = gathered_stream(torch.cat([key, value], dim=1), micro_batch.part).chunk(2, dim=1)
            output = self._attend(query, key, value, micro_batch.part.pieces, packed_seq_params)
        return output.flatten(1).unsqueeze(1)

    def _own_heads(self, query: Tensor, key: Tensor, value: Tensor, part: Part) -> list[Tensor]:
        """This context rank's share of the heads, over the whole stream; where key-value heads are too few for a share,
        each rank gets the one that its query heads read."""
        num_ranks = parallel_state.get_context_parallel_world_size()
        if key.shape[1] < num_ranks:
            key, value = (x.repeat_interleave(num_ranks // key.shape[1], dim=1) for x in (key, value))
        by_rank = [x.unflatten(1, (num_ranks, -1)) for x in (query, key, value)]
        heads = stream_of_heads(torch.cat(by_rank, dim=2).flatten(1, 2), part)
        return list(heads.split([x.shape[2] for x in by_rank], dim=1))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment | Piece], stream: StreamParams
    ) -> Tensor:
        """[T, A, D], from query [T, A, D], key and value [stream tokens, K, D]."""
        query_ATD, key_KTD, value_KTD = (x.transpose(0, 1) for x in (query, key, value))
        outputs = [self._segment(query_ATD, key_KTD, value_KTD, segment, stream) for segment in segments]
        return torch.cat(outputs, dim=1).transpose(0, 1)

    def _segment(self, query: Tensor, key: Tensor, value: Tensor, segment: Segment | Piece, stream: StreamParams) -> Tensor:
        own, prompt = segment.keys, slice(segment.prompt_start, segment.prompt_end)
        if segment.prompt_end > segment.prompt_start:
            key, value = (torch.cat([x[:, prompt], x[:, own]], dim=1) for x in (key, value))
        else:
            key, value = key[:, own], value[:, own]
        mask = stream.mask(segment.end - segment.start, key.shape[1], self.window, query)
        return F.scaled_dot_product_attention(
            query[None, :, segment.start : segment.end],
            key[None],
            value[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[0] != key.shape[0],
        )[0]
