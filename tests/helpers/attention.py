"""Streams of segments, operands, and attention by its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megadpo.data.batches.collate import collate_groups
from megadpo.data.batches.context_shard import with_context_shard
from megadpo.data.groups import Group

SCALE = 0.7


def stream(lengths: list[tuple[int, ...]], share_prompts: bool = True, part: int | None = None) -> tuple[Any, int, int]:
    """Segments or pieces, queries and keys of groups with a prompt and responses of these lengths."""
    groups = [
        Group((np.zeros(prompt, np.int32),), tuple(np.zeros(n, np.int32) for n in responses), row)
        for row, (prompt, *responses) in enumerate(lengths)
    ]
    micro_batch = collate_groups(groups, range(len(groups)), share_prompts, multiple_of=4)
    num_keys = len(micro_batch.tokens_T)
    if part is None:
        return micro_batch.segments, num_keys, num_keys
    held = with_context_shard(micro_batch, 2, part).shard
    assert held is not None
    return held.segments, len(held.tokens_T), num_keys


def operands(
    num_queries: int, num_keys: int, heads: tuple[int, int], dtype: torch.dtype, head_dim: int = 16
) -> list[Tensor]:
    """Query, key, value, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_queries, heads[0]), (num_keys, heads[1]), (num_keys, heads[1]), (num_queries, heads[0])]
    return [torch.randn(*shape, head_dim, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def by_definition(query: Tensor, key: Tensor, value: Tensor, segments: Any, window: int | None) -> Tensor:
    """In fp64, with every query's keys counted one by one."""
    num_sharing = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(num_sharing, dim=1) for x in (key, value))
    outputs = []
    for segment in segments:
        seen = [*range(segment.prompt_start, segment.prompt_end), *range(segment.keys.start, segment.keys.stop)]
        for place in range(segment.end - segment.start):
            keys = seen[: len(seen) - (segment.end - segment.start) + place + 1][-window if window else 0 :]
            scores_AK = torch.einsum("ad,kad->ak", query[segment.start + place].double(), key[keys]) * SCALE
            outputs.append(torch.einsum("ak,kad->ad", scores_AK.softmax(-1), value[keys]))
    return torch.stack(outputs)


SHAPES = {
    "pairs": [(9, 5, 7), (3, 11, 2), (12, 4, 4)],
    "lists and single answers": [(6, 3), (5, 4, 2, 6, 1), (8, 3, 3, 9)],
    "one long among short ones": [(3, 2, 2), (70, 30, 41), (4, 1, 2)],
    "answers without a prompt": [(0, 9, 5), (7, 6, 6)],
    "single tokens": [(1, 1, 1), (1, 1)],
}


FOR_SEQUENCES = ("varlen", "flash_attn", "transformer_engine")
"""Those that call a GPU kernel for sequences of different lengths."""
