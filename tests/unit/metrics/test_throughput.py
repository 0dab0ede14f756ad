"""Speed and memory."""

from __future__ import annotations

import torch

from megadpo.metrics.throughput import peak_memory, peak_memory_bytes, throughput


def test_speed_is_counts_over_seconds() -> None:
    speed = throughput(seconds=2.0, num_tokens=1000, num_pairs=8)
    assert speed == {"step_seconds": 2.0, "tokens_per_second": 500.0, "pairs_per_second": 4.0}


def test_peak_memory_on_cpu_grows_with_what_is_held_and_is_in_bytes() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    assert 50 * 2**20 < before < 64 * 2**30
    held = torch.ones(before // 4 + 2**26)  # more than the peak so far, 4 bytes an element
    after = peak_memory_bytes(torch.device("cpu"))
    assert after - before > held.numel() * 4 // 8
    assert peak_memory(torch.device("cpu"))["peak_memory_gib"] >= after / 2**30
