"""What a step has to compute, and what the machine's matrix product can do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from megadpo.data.batches.bin_packing import attention_pairs
from megadpo.data.groups import Group
from megadpo.data.store import GroupStore
from megadpo.model.flop import forward_flop


def useful_flop(groups: Sequence[Group], config: Any, body_parameters: int, live_reference: bool) -> float:
    """FLOP of one step on `groups`, each prompt computed once for all its responses.

    megadpo/model/flop.py's sums, of which `Work.step` says the same where all heads together are as wide as the hidden
    size. Where they are wider (Qwen3 of 0.6 B) attention is counted as if they were not, as in every published figure.

    Args:
        config: of a Llama-like model in Hugging Face's names.
        body_parameters: without embedding and head; norms, of a part in ten thousand, are in it.
    """
    num_tokens = sum(group.num_stream_tokens(True) for group in groups)
    num_scored = sum(len(response) for group in groups for response in group.responses)
    attended = float(attention_pairs(GroupStore.of(groups), share_prompts=True).sum())
    head, width = config.hidden_size * config.vocab_size, config.hidden_size * config.num_hidden_layers
    forward = forward_flop(num_tokens, num_scored, attended, body_parameters, head, width)
    return forward * (4 if live_reference else 3)


def product_peak(size: int = 2048, rounds: int = 5) -> float:
    """FLOP a second of a square fp32 matrix product here and now; the fastest of some rounds."""
    import torch

    left, right = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)
