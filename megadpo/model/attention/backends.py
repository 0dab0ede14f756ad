"""Which kernel computes attention: chosen once for a run, by device, dtype and what is installed.

* "cpu_flash": torch's CPU flash kernel over blocks and batches (attention_cpu.py);
* "varlen", "flash_attn", "transformer_engine": one call of a GPU kernel (sequences.py);
* "sdpa": torch's scaled_dot_product_attention, segment by segment, on anything (attention_plain.py).

Axes: T stream tokens, S keys of the stream, A query heads, K key-value heads, D head dimension.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megadpo.data.batches.micro_batch import Piece, Segment
from megadpo.errors import UserError
from megadpo.model.attention.cpu_blocks import blocks_of
from megadpo.model.attention.cpu_flash import attend_in_blocks, has_kernel
from megadpo.model.attention.sdpa import attend_by_segment
from megadpo.model.attention.sequences import (
    Kernel,
    attend_in_one_call,
    flash_attn_kernel,
    sequences_of,
    torch_kernel,
    transformer_engine_kernel,
)

KERNELS: dict[str, Kernel] = {
    "varlen": torch_kernel,
    "flash_attn": flash_attn_kernel,
    "transformer_engine": transformer_engine_kernel,
}

BACKENDS = ("cpu_flash", *KERNELS, "sdpa")
"""In the order in which "auto" looks for one that can be used; the last one always can."""


def choose_backend(requested: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """One of BACKENDS: the one that was asked for, or for "auto" the first that can be used.

    Raises:
        UserError: the one that was asked for cannot be used.
    """
    if requested == "auto":
        return next(name for name in BACKENDS if why_not(name, device, dtype, head_dim) is None)
    reason = why_not(requested, device, dtype, head_dim)
    if reason is not None:
        raise UserError(f"model.attention is {requested}, but {reason}; set it to auto")
    return requested


def why_not(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this backend cannot be used here; None: it can."""
    if name == "sdpa":
        return None
    if name == "cpu_flash":
        if device.type != "cpu":
            return f"that is for CPUs and this run computes on {device.type}"
        return None if has_kernel() else f"torch {torch.__version__} does not have that kernel"
    if device.type != "cuda":
        return "that needs a CUDA device, of which there is none"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"that computes in bf16 and not in {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"that needs compute capability 8.0 and {torch.cuda.get_device_name(device)} has less"
    if head_dim > 256 or head_dim % 8:
        return f"that needs a head dimension of at most 256 in steps of 8 and this model's is {head_dim}"
    return {"varlen": _no_varlen, "flash_attn": _no_flash_attn, "transformer_engine": _no_transformer_engine}[name]()


def _no_varlen() -> str | None:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} does not have that"
    from torch.nn.attention.sequences import varlen_attn

    missing = {"scale", "window_size", "enable_gqa"} - inspect.signature(varlen_attn).parameters.keys()
    return f"that of torch {torch.__version__} does not take {', '.join(sorted(missing))}" if missing else None


def _no_flash_attn() -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    from flash_attn import flash_attn_varlen_func

    # Since 2.1 "causal" counts from the last key, as is meant here; windows came later.
    has_windows = "window_size" in inspect.signature(flash_attn_varlen_func).parameters
    return None if has_windows else "the installed flash-attn is older than 2.3"


def _no_transformer_engine() -> str | None:
    if importlib.util.find_spec("transformer_engine") is None:
        return "TransformerEngine is not installed"
    from transformer_engine.pytorch import DotProductAttention

    needed = {"attn_mask_type", "window_size", "cu_seqlens_kv", "max_seqlen_kv"}
    missing = needed - inspect.signature(DotProductAttention.forward).parameters.keys()
    return f"the installed one does not take {', '.join(sorted(missing))}" if missing else None


def prepare_attention(backend: str, segments: Sequence[Segment | Piece], window: int | None, key: Tensor) -> Any:
    """What `attend` needs to know of a stream, the same for all layers with this window.

    Args:
        segments: the queries, in order, with their keys in the stream.
        window: a query sees this many keys, itself included; None: all before it.
        key: [S, K, D] of any layer.
    """
    if backend == "cpu_flash":
        return blocks_of(segments, window, key.dtype)
    if backend == "sdpa":
        return segments, window, {}
    return sequences_of(segments, len(key), key.device), window


def attend(backend: str, query: Tensor, key: Tensor, value: Tensor, prepared: Any, scale: float) -> Tensor:
    """[T, A, D], from query [T, A, D], key and value [S, K, D]; `prepared` by `prepare_attention`."""
    if backend == "cpu_flash":
        return attend_in_blocks(query, key, value, prepared, scale)
    if backend == "sdpa":
        segments, window, masks = prepared
        return attend_by_segment(query, key, value, segments, window, scale, masks)
    sequences, window = prepared
    return attend_in_one_call(query, key, value, sequences, window, scale, KERNELS[backend])
