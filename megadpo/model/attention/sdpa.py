"""Attention of a packed stream by torch's scaled_dot_product_attention, segment by segment: on any device, in any dtype.

Keys and values of prompt and segment are put side by side, and a mask says which query sees which key. Softcaps and sinks,
which torch's function lacks, are computed by explicit.py.

Axes: T stream tokens, S keys of the stream, A query heads, K key-value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from megadpo.data.batches.micro_batch import Segment, ShardSegment
from megadpo.model.attention.base import AttentionBackend, AttentionNeeds
from megadpo.model.attention.cpu_blocks import additive, window_mask
from megadpo.model.attention.explicit import explicit_attention

Masks = MutableMapping[tuple[int, int], Tensor | None]


@dataclass(frozen=True)
class MaskedSegments:
    """Segments of a stream.

    Attributes:
        window: a query sees this many keys, itself included; None: all before it.
        masks: by numbers of queries and keys, made when first needed and kept for further layers; None: causal square.
    """

    segments: Sequence[Segment | ShardSegment]
    window: int | None
    masks: Masks = field(default_factory=dict)


class SdpaBackend:
    """One call of scaled_dot_product_attention a segment."""

    name = "sdpa"

    def why_not(self, needs: AttentionNeeds) -> str | None:
        """It can always be used."""
        return None

    def prepare(self, segments: Sequence[Segment | ShardSegment], window: int | None, key: Tensor) -> MaskedSegments:
        """Masks are made by the first layer."""
        return MaskedSegments(segments, window)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prepared: MaskedSegments,
        scale: float,
        softcap: float | None = None,
        sinks_A: Tensor | None = None,
    ) -> Tensor:
        """[T, A, D of the values], from query [T, A, D], key and value [S, K, D]."""
        query_ATD, key_KSD, value_KSD = (x.transpose(0, 1) for x in (query, key, value))
        outputs = []
        for segment in prepared.segments:
            keys, values = (_with_prompt(x, segment) for x in (key_KSD, value_KSD))
            mask = _mask(segment.end - segment.start, keys.shape[1], prepared.window, query, prepared.masks)
            operands = (query_ATD[None, :, segment.start : segment.end], keys[None], values[None])
            if softcap is not None or sinks_A is not None:
                outputs.append(explicit_attention(*operands, mask, scale, softcap, sinks_A)[0])
                continue
            output = F.scaled_dot_product_attention(
                *operands,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            outputs.append(output[0])
        return torch.cat(outputs, dim=1).transpose(0, 1)


def _with_prompt(rows_KSD: Tensor, segment: Segment | ShardSegment) -> Tensor:
    own = rows_KSD[:, segment.keys]
    if segment.prompt_end == segment.prompt_start:
        return own
    return torch.cat([rows_KSD[:, segment.prompt_start : segment.prompt_end], own], dim=1)


def _mask(num_queries: int, num_keys: int, window: int | None, query: Tensor, masks: Masks) -> Tensor | None:
    """None where a plain causal square is meant."""
    size = (num_queries, num_keys)
    if size not in masks:
        if num_keys == num_queries and (window is None or num_keys <= window):
            masks[size] = None
        else:
            mask = window_mask(num_queries, num_keys, window, query.device)
            # The CPU kernel adds its mask: given a boolean one, it would convert it at every layer.
            masks[size] = additive(mask, query.dtype) if query.device.type == "cpu" else mask
    return masks[size]


BACKEND: AttentionBackend = SdpaBackend()
