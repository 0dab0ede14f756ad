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


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's generators; what is random in our own data path has generators of its own."""
    random.seed(seed)
    torch.manual_seed(seed)
