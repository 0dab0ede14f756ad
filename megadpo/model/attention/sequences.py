"""What backends share whose kernel takes sequences of different lengths in one call: torch's `varlen_attn`, flash-attn and
TransformerEngine's `DotProductAttention`.

These kernels take queries and keys of all sequences one after the other, and where each begins; with fewer queries than keys
the last query sees all keys. So a segment is a sequence whose keys are those of its prompt and its own: they are gathered
by an index made once a micro-batch, and the gather's backward adds up a prompt's gradients over its responses. On CUDA with
Triton one kernel does the one and one the other (gather_keys.py).

Axes: T stream tokens, S keys of the stream, G gathered keys, N segments, A query heads, K key-value heads, D head dimension.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megadpo.data.batches.micro_batch import Segment, ShardSegment
from megadpo.model.attention.base import AttentionNeeds
from megadpo.model.recompute import recomputable

if TYPE_CHECKING:  # it imports Triton
    from megadpo.model.attention.gather_keys import Readers


@dataclass(frozen=True)
class Sequences:
    """A stream's segments as such kernels take them.

    Attributes:
        keys_G: int64, the stream's keys in the order that the kernel reads them; None: as they lie.
        query_starts, key_starts: int32 [N + 1], where each sequence begins, and the end of the last.
        max_queries, max_keys: of a sequence.
        reach: how many keys before and after its own a query sees (-1: all).
        readers: which gathered keys each of the stream's is read as, where Triton's kernels do the gathering; else None.
    """

    keys_G: Tensor | None
    query_starts: Tensor
    key_starts: Tensor
    max_queries: int
    max_keys: int
    reach: tuple[int, int]
    readers: Readers | None = None

    def gathered(self, key: Tensor, value: Tensor, num_copies: int = 1) -> tuple[Tensor, Tensor]:
        """[G, K * num_copies, D] each, copies of a head side by side, from key and value [S, K, D] of the stream."""
        if self.keys_G is None and num_copies == 1:
            return key, value
        copied = functools.partial(self._copied, num_copies=num_copies)
        # Of other ranks' keys some may be left out: then the copies are smaller than what they are copied from.
        if self.keys_G is not None and len(self.keys_G) * num_copies < len(key):
            return copied(key), copied(value)
        return recomputable(copied, key), recomputable(copied, value)

    def _copied(self, rows_SKD: Tensor, num_copies: int) -> Tensor:
        if self.readers is not None:
            from megadpo.model.attention.gather_keys import gather_keys

            return gather_keys(rows_SKD, self.readers, num_copies)
        rows = rows_SKD if self.keys_G is None else rows_SKD.index_select(0, self.keys_G)
        return rows if num_copies == 1 else rows.repeat_interleave(num_copies, dim=1)


def sequences_of(
    segments: Sequence[Segment | ShardSegment], window: int | None, num_keys: int, device: torch.device
) -> Sequences:
    """The sequences of a stream that has `num_keys` keys; segments without tokens are left out."""
    there = [segment for segment in segments if segment.end > segment.start]
    keys = [np.concatenate([np.arange(s.prompt_start, s.prompt_end), np.arange(s.keys.start, s.keys.stop)]) for s in there]
    keys_G = np.concatenate(keys)
    is_gathered = not np.array_equal(keys_G, np.arange(num_keys))
    num_queries_N, num_keys_N = [s.end - s.start for s in there], [len(some) for some in keys]

    def starts(lengths: Sequence[int]) -> Tensor:
        return copied_to(device, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))

    index_G = copied_to(device, keys_G) if is_gathered else None
    return Sequences(
        index_G,
        starts(num_queries_N),
        starts(num_keys_N),
        max(num_queries_N),
        max(num_keys_N),
        (-1, 0) if window is None else (window - 1, 0),
        None if index_G is None else _readers_by_kernel(index_G, keys_G, num_keys),
    )


def _readers_by_kernel(index_G: Tensor, keys_G: np.ndarray[Any, Any], num_keys: int) -> Readers | None:
    if index_G.device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from megadpo.model.attention.gather_keys import Readers, readers_of

    return Readers(index_G, *(copied_to(index_G.device, numbers) for numbers in readers_of(keys_G, num_keys)))


def copied_to(device: torch.device, numbers: np.ndarray[Any, Any]) -> Tensor:
    """`numbers` on the device; on a GPU by a copy that nothing waits for."""
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def why_not_on_this_gpu(needs: AttentionNeeds) -> str | None:
    """Why no kernel for sequences can be used, whichever library it is of; None: the device and the model allow them."""
    if needs.device.type != "cuda":
        return "that needs a CUDA device, of which there is none"
    if needs.dtype not in (torch.bfloat16, torch.float16):
        return f"that computes in bf16 and not in {str(needs.dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(needs.device) < (8, 0):
        return f"that needs compute capability 8.0 and {torch.cuda.get_device_name(needs.device)} has less"
    if needs.largest_dim > 256 or needs.largest_dim % 8:
        return f"that needs a head dimension of at most 256 in steps of 8 and this model's is {needs.largest_dim}"
    return None


def why_not_these_scores(needs: AttentionNeeds, takes_softcap: bool = False) -> str | None:
    """Why such a kernel does not compute the model's softmax: none gives a log-sum-exp with a gradient, as sinks need."""
    if needs.has_sinks:
        return "that does not compute the attention sinks that this model has"
    if needs.has_softcap and not takes_softcap:
        return "that does not compute the softcap that this model has on its attention's scores"
    return None
