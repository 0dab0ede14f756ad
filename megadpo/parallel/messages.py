"""Small values from every rank to every rank, as JSON: nothing that is read here can run code."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from megadpo.platform.device import compute_device


def gathered(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What each rank of the group (None: of the world) gave, in rank order, on every one; collective. JSON values only."""
    text = json.dumps(value).encode()
    device = torch.device("cpu") if dist.get_backend(group) == "gloo" else compute_device()
    size = torch.tensor([len(text)], device=device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    longest = int(torch.cat(sizes).max())
    own = torch.zeros(longest, dtype=torch.uint8)
    own[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    texts = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in sizes]
    dist.all_gather(texts, own.to(device), group=group)
    return [json.loads(bytes(text.cpu().numpy()[: int(size)])) for text, size in zip(texts, sizes, strict=True)]
