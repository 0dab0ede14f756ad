"""Attention of a packed stream by torch's FlexAttention (torch 2.6 and later) on CUDA, in any of fp32, bf16 and fp16.

Its kernel reads the stream's own keys, where others read a copy with each prompt repeated: what a query sees is two ranges
of keys, its prompt's and its own segment's. A mask says so for each pair, and a map of blocks says which pairs of a block of
queries and a block of keys are looked at, and which of them need no mask. A softcap is a function of each score, and sinks
come in by the log-sum-exp that it gives, gradient included.

Axes: T stream tokens, S keys of the stream, A query heads, K key-value heads, D head dimension; Q blocks of queries and B
blocks of keys.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megadpo.data.batches.micro_batch import Segment, ShardSegment
from megadpo.model.attention.base import AttentionBackend, AttentionNeeds
from megadpo.model.attention.sinks import with_sinks

BLOCK = 128
"""Queries, and keys, of a block; the kernel's own tiles divide it."""

GRAPHS = 64
"""Most variants of the kernel that are compiled: with and without gradients, of lengths that are equal or not, that whole
blocks fill or not."""


class FlexBackend:
    """`flex_attention`, compiled."""

    name = "flex"

    def why_not(self, needs: AttentionNeeds) -> str | None:
        """Without a GPU or Triton, or where this torch does not have the function or lacks the model's head dimension."""
        if needs.device.type != "cuda":
            return "that needs a CUDA device, of which there is none"
        if needs.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"that does not compute in {str(needs.dtype).removeprefix('torch.')}"
        if torch.cuda.get_device_capability(needs.device) < (8, 0):
            return f"that needs compute capability 8.0 and {torch.cuda.get_device_name(needs.device)} has less"
        for head_dim in (needs.head_dim, needs.value_dim or needs.head_dim):
            if not 16 <= head_dim <= 256:
                return f"that needs a head dimension from 16 to 256 and this model's is {head_dim}"
            reason = _why_not_installed(head_dim)
            if reason is not None:
                return reason
        return None

    def prepare(self, segments: Sequence[Segment | ShardSegment], window: int | None, key: Tensor) -> Any:
        """The block mask of `block_mask_of`."""
        return block_mask_of(segments, window, len(key), key.device)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prepared: Any,
        scale: float,
        softcap: float | None = None,
        sinks_A: Tensor | None = None,
    ) -> Tensor:
        """[T, A, D of the values], from query [T, A, D], key and value [S, K, D]."""
        operands = [x.transpose(0, 1)[None] for x in (query, key, value)]
        output: Tensor = _function(query.device.type == "cuda")(*operands, prepared, scale, softcap, sinks_A)
        return output[0].transpose(0, 1)


def block_mask_of(
    segments: Sequence[Segment | ShardSegment], window: int | None, num_keys: int, device: torch.device
) -> Any:
    """The BlockMask of a stream that has `num_keys` keys, made without ever asking for each pair of a query and a key."""
    from torch.nn.attention.flex_attention import BlockMask

    ranges = seen_ranges(segments, window)
    num_queries = ranges.shape[1]
    padded = np.zeros((4, -(-num_queries // BLOCK) * BLOCK), np.int32)  # a query of the padding sees nothing
    padded[:, :num_queries] = ranges
    # A tensor for each: the compiled mask may index what it holds by the query's number only.
    prompt_first_T, prompt_end_T, own_first_T, own_end_T = torch.from_numpy(padded).to(device).unbind()

    def is_seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_prompt = (key >= prompt_first_T[query]) & (key < prompt_end_T[query])
        return in_prompt | ((key >= own_first_T[query]) & (key < own_end_T[query]))

    first_B = torch.arange(0, num_keys, BLOCK, device=device, dtype=torch.int32)

    def num_before_TB(end_T: Tensor) -> Tensor:
        return (end_T[:, None] - first_B).clamp_(0, BLOCK)

    seen_TB = num_before_TB(prompt_end_T) - num_before_TB(prompt_first_T)
    seen_TB += num_before_TB(own_end_T) - num_before_TB(own_first_T)
    seen_QB = seen_TB.unflatten(0, (-1, BLOCK)).sum(1)
    is_whole_QB = seen_QB == BLOCK * BLOCK
    partly, wholly = (_listed(blocks_QB) for blocks_QB in ((seen_QB > 0) & ~is_whole_QB, is_whole_QB))
    return BlockMask.from_kv_blocks(
        *partly, *wholly, BLOCK_SIZE=BLOCK, mask_mod=is_seen, seq_lengths=(num_queries, num_keys)
    )


def seen_ranges(segments: Sequence[Segment | ShardSegment], window: int | None) -> np.ndarray[Any, Any]:
    """int32 [4, T], of each query the keys [first, end) that it sees of its prompt and, further, of its own segment."""
    parts = [np.zeros((4, 0), np.int32)]
    for segment in segments:
        num_queries = segment.end - segment.start
        own_end = np.arange(segment.keys.stop - num_queries, segment.keys.stop) + 1
        own_first, prompt_first = np.full_like(own_end, segment.keys.start), np.full_like(own_end, segment.prompt_start)
        if window is not None:
            prompt_first = np.maximum(prompt_first, segment.prompt_end - np.maximum(window - (own_end - own_first), 0))
            own_first = np.maximum(own_first, own_end - window)
        parts.append(np.stack([prompt_first, np.full_like(own_end, segment.prompt_end), own_first, own_end]))
    return np.concatenate(parts, axis=1).astype(np.int32)


def _listed(blocks_QB: Tensor) -> tuple[Tensor, Tensor]:
    """As BlockMask takes them, int32 [1, 1, Q] and [1, 1, Q, B]: how many blocks of keys, and these before the others."""
    order_QB = blocks_QB.int().argsort(dim=1, descending=True, stable=True)
    return blocks_QB.sum(1, dtype=torch.int32)[None, None], order_QB.int()[None, None].contiguous()


@functools.cache
def _function(is_compiled: bool, backend: str = "inductor") -> Callable[..., Tensor]:
    """Compiled for any lengths; on a CPU, where only tests come, not compiled."""
    if not is_compiled:
        return _flex
    # Whole graphs only: a graph break would mean every score in memory.
    compiled = torch.compile(_flex, fullgraph=True, backend=backend)

    def call(*arguments: Any) -> Tensor:
        # Scale and softcap are to be constants of the kernel, though another model's differ.
        with torch._dynamo.config.patch(specialize_float=True, cache_size_limit=GRAPHS):
            return compiled(*arguments)

    return call


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Any,
    scale: float,
    softcap: float | None = None,
    sinks_A: Tensor | None = None,
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    found = flex_attention(
        query,
        key,
        value,
        score_mod=None if softcap is None else _capped_at(softcap),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        # Not the kernel for few queries, which is for inference.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
        **({} if sinks_A is None else _lse_too()),
    )
    if sinks_A is None:
        output: Tensor = found
        return output
    output, lse = found
    return with_sinks(output, lse if isinstance(lse, Tensor) else lse.lse, sinks_A[:, None])[0].to(query.dtype)


def _capped_at(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, *places: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def _lse_too() -> dict[str, Any]:
    """What asks for the log-sum-exp as a second result: since torch 2.9 that is another option."""
    from torch.nn.attention import flex_attention

    request = getattr(flex_attention, "AuxRequest", None)
    return {"return_lse": True} if request is None else {"return_aux": request(lse=True)}


def _why_not_installed(head_dim: int) -> str | None:
    if importlib.util.find_spec("torch.nn.attention.flex_attention") is None:
        return f"torch {torch.__version__} does not have that"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from torch.nn.attention import flex_attention

    # torch 2.6 says by this function which head dimensions it takes.
    if hasattr(flex_attention, "_supported_head_dim") and head_dim & (head_dim - 1):
        return (
            f"that of torch {torch.__version__} needs a head dimension that is a power of 2 and this model's is {head_dim}"
        )
    return None


BACKEND: AttentionBackend = FlexBackend()
