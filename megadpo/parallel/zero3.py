"""Parameters that ZeRO-3 has cut over the data-parallel ranks, read and written as a whole or as this rank's part.

DeepSpeed leaves such a parameter empty and keeps this rank's part, a run of the flattened tensor padded at the end, in
``ds_tensor``. Every function here also takes an ordinary parameter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO-3 keeps only a part of the parameter here."""
    return hasattr(parameter, "ds_tensor")


def own_part(parameter: Any) -> Tensor:
    """The values that this rank keeps: the part (flat, with its padding), or the whole parameter."""
    return parameter.ds_tensor if is_partitioned(parameter) else parameter.data


def place_of_own_part(parameter: Any) -> int:
    """Which of the equal parts of the flattened parameter `own_part` is, from 0."""
    return dist.get_rank(parameter.ds_process_group) if is_partitioned(parameter) else 0


def whole(parameter: Any) -> Tensor:
    """The whole values; collective over the parameter's data-parallel ranks where it is partitioned."""
    if not is_partitioned(parameter):
        return parameter.data
    part = _read_part(parameter)
    num_ranks = dist.get_world_size(parameter.ds_process_group)
    joined = torch.empty(num_ranks * part.numel(), dtype=part.dtype, device=part.device)
    dist.all_gather_into_tensor(joined, part.contiguous(), group=parameter.ds_process_group)
    return joined[: parameter.ds_numel].view(parameter.ds_shape)


def _read_part(parameter: Any) -> Tensor:
    """This rank's part, read where it is in a file (offload to NVMe)."""
    if parameter.ds_tensor.status.name == "INFLIGHT":
        parameter.nvme_swapper.synchronize_reads()
    if parameter.ds_tensor.status.name == "AVAILABLE":
        return parameter.ds_tensor.data
    part = torch.empty(parameter.ds_tensor.ds_numel, dtype=parameter.dtype)
    parameter.nvme_swapper.swap_into_buffer(parameter, part)
    return part.to(parameter.device)


def set_whole(parameter: Any, values: Tensor) -> None:
    """Keep this rank's share of `values`, which every rank has whole."""
    with torch.no_grad():
        if not is_partitioned(parameter):
            parameter.data.copy_(values)
            return
        part = parameter.ds_tensor.data
        start = dist.get_rank(parameter.ds_process_group) * part.numel()
        mine = values.reshape(-1)[start : start + part.numel()]
        part[: len(mine)].copy_(mine)
