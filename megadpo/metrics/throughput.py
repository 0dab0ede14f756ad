"""How fast a step was and how much memory it took."""

from __future__ import annotations

import resource
import sys

import torch


def throughput(seconds: float, num_tokens: int, num_pairs: int) -> dict[str, float]:
    """Speed of a step over the whole world.

    Args:
        seconds: wall time of the step on the rank that reports it.
        num_tokens: tokens that went through the policy on all ranks (a shared prompt counts once).
        num_pairs: pairs of the global batch.
    """
    assert seconds > 0
    return {
        "step_seconds": seconds,
        "tokens_per_second": num_tokens / seconds,
        "pairs_per_second": num_pairs / seconds,
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held so far: allocated on the GPU for CUDA, resident set for CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory(device: torch.device) -> dict[str, float]:
    """`peak_memory_bytes` as a metric, in GiB."""
    return {"peak_memory_gib": peak_memory_bytes(device) / 2**30}
