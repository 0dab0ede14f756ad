"""What a step has to compute, as megadpo/model/flop.py counts it, and what the machine's matrix product can do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from megadpo.data.groups import Group
from megadpo.model.flop import forward_flop


def useful_flop(groups: Sequence[Group], config: Any, body_parameters: int, live_reference: bool) -> float:
    """FLOP of one step on `groups`, each prompt computed once for all its responses.

    Args:
        config: of a Llama-like model in Hugging Face's names.
        body_parameters: without embedding and head.
    """
    num_tokens = sum(group.num_stream_tokens(True) for group in groups)
    num_scored = sum(len(response) for group in groups for response in group.responses)
    attended = sum(attention_pairs(group) for group in groups)
    head, width = config.hidden_size * config.vocab_size, config.hidden_size * config.num_hidden_layers
    forward = forward_flop(num_tokens, num_scored, attended, body_parameters, head, width)
    return forward * (4 if live_reference else 3)


def attention_pairs(group: Group) -> float:
    """Query-key pairs of a group whose responses share one prompt."""
    num_prompt = len(group.prompts[0])
    pairs = num_prompt * (num_prompt + 1) / 2
    return pairs + sum(len(response) * (num_prompt + (len(response) + 1) / 2) for response in group.responses)


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
