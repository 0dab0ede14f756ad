"""Attention of a packed stream by the library flash-attn on CUDA: its version 3 on Hopper where that is installed, else 2.3
and later; softcaps from 2.6.

Axes: T stream tokens, S keys of the stream, A query heads, K key-value heads, D head dimension.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megadpo.data.batches.micro_batch import Segment, ShardSegment
from megadpo.model.attention.base import AttentionBackend, AttentionNeeds
from megadpo.model.attention.head_dims import cut_to, of_one_dim
from megadpo.model.attention.sequences import Sequences, sequences_of, why_not_on_this_gpu, why_not_these_scores


class FlashAttnBackend:
    """`flash_attn_varlen_func`, whose "causal" counts from the last key; before 2.1 it meant the upper left corner."""

    name = "flash_attn"

    def why_not(self, needs: AttentionNeeds) -> str | None:
        """Without a GPU, or where the library is not installed, too old, or lacks what the model has."""
        reason = why_not_on_this_gpu(needs) or (None if _has_version_3(needs.device) else _why_not_installed())
        if reason is not None:
            return reason
        return why_not_these_scores(needs, "softcap" in inspect.signature(_function(needs.device)).parameters)

    def prepare(self, segments: Sequence[Segment | ShardSegment], window: int | None, key: Tensor) -> Sequences:
        """See `sequences_of`."""
        return sequences_of(segments, window, len(key), key.device)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prepared: Sequences,
        scale: float,
        softcap: float | None = None,
        sinks_A: Tensor | None = None,
    ) -> Tensor:
        """[T, A, D of the values], from query [T, A, D], key and value [S, K, D]."""
        assert sinks_A is None
        value_dim = value.shape[2]
        query, key, value = of_one_dim(query, key, value)
        key, value = prepared.gathered(key, value)
        output = _function(query.device)(
            query,
            key,
            value,
            cu_seqlens_q=prepared.query_starts,
            cu_seqlens_k=prepared.key_starts,
            max_seqlen_q=prepared.max_queries,
            max_seqlen_k=prepared.max_keys,
            softmax_scale=scale,
            causal=True,
            window_size=prepared.reach,
            **({} if softcap is None else {"softcap": softcap}),
        )
        # The first ones of version 3 give the log-sum-exp, too.
        output = output[0] if isinstance(output, tuple) else output
        return cut_to(output, value_dim)


def _function(device: torch.device) -> Callable[..., Any]:
    if _has_version_3(device):
        from flash_attn_interface import flash_attn_varlen_func
    else:
        from flash_attn import flash_attn_varlen_func
    return flash_attn_varlen_func


@functools.cache
def _has_version_3(device: torch.device) -> bool:
    """Whether its kernels, which are for Hopper, can be used; they come as a module of their own."""
    if device.type != "cuda" or importlib.util.find_spec("flash_attn_interface") is None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def _why_not_installed() -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    from flash_attn import flash_attn_varlen_func

    # Since 2.1 "causal" counts from the last key, as is meant here; windows came later.
    has_windows = "window_size" in inspect.signature(flash_attn_varlen_func).parameters
    return None if has_windows else "the installed flash-attn is older than 2.3"


BACKEND: AttentionBackend = FlashAttnBackend()
