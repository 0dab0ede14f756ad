"""The device this process computes on, and the communication backend that goes with it."""

from __future__ import annotations

import os
import random

import torch


def compute_device() -> torch.device:
    """The accelerator of this local rank where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def communication_backend() -> str:
    """The torch.distributed backend for `compute_device`: nccl on CUDA, gloo on CPU."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def resolve_dtype(name: str) -> torch.dtype:
    """The parameter dtype of a `model.dtype` value: "auto" is bf16 on CUDA and fp32 on CPU."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def bf16_is_slow() -> bool:
    """Whether this process computes on a processor that has no instructions for bf16 nor any that it is emulated by.

    torch then multiplies element by element: 5 to 60 times slower than in fp32 on one with AVX2 only.
    """
    is_known = not torch.cuda.is_available() and torch.backends.mkldnn.is_available()
    return is_known and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's generators; what is random in our own data path has generators of its own."""
    random.seed(seed)
    torch.manual_seed(seed)
