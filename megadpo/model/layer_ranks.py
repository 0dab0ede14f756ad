"""The ranks that share the matrices of a linear layer with frozen weights, and what they send each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


@dataclass(frozen=True)
class LayerRanks:
    """The ranks that share a layer's matrices, and the sums that they do.

    Attributes:
        group: these ranks; None: there is one.
        is_expert: sums over the group are the dispatcher's.
    """

    group: dist.ProcessGroup | None
    is_sequence_parallel: bool
    is_expert: bool

    @classmethod
    def of(cls, layer: Any) -> LayerRanks:
        group = layer.tp_group if dist.get_world_size(layer.tp_group) > 1 else None
        is_expert = bool(layer.is_expert)
        return cls(group, group is not None and layer.sequence_parallel and not is_expert, is_expert)

    def summed_for_parameter(self, tensor: Tensor) -> Tensor:
        """What the dispatcher leaves in parts, whole, where a gradient is taken of it."""
        if self.group is not None and self.is_expert:
            tensor = tensor.clone()
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gathered(self, tensor: Tensor, new: Callable[[Sequence[int]], Tensor] | None = None) -> Tensor:
        """The rows of all ranks where each has its part of the sequence."""
        if not self.is_sequence_parallel:
            return tensor
        shape = (len(tensor) * dist.get_world_size(self.group), *tensor.shape[1:])
        whole = tensor.new_empty(shape) if new is None else new(shape)
        dist.all_gather_into_tensor(whole, tensor.contiguous(), group=self.group)
        return whole

    def reduced(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """The sum over the group, of this rank's part of the sequence where each has one; and what to wait for."""
        if self.group is None or self.is_expert:
            return tensor, None
        if not self.is_sequence_parallel:
            return tensor, dist.all_reduce(tensor, group=self.group, async_op=True)
        part = tensor.new_empty((len(tensor) // dist.get_world_size(self.group), *tensor.shape[1:]))
        return part, dist.reduce_scatter_tensor(part, tensor, group=self.group, async_op=True)


def rows(tensor: Tensor) -> Tensor:
    """[..., columns] -> contiguous [rows, columns]."""
    return tensor.contiguous().flatten(0, -2)


def wait(collective: Any) -> None:
    if collective is not None:
        collective.wait()


def gather_buffer(like: Tensor) -> Callable[[Sequence[int]], Tensor]:
    """Megatron's shared buffer for what is gathered over tensor ranks and read at once."""
    return lambda shape: parallel_state.get_global_memory_buffer().get_tensor(list(shape), like.dtype, "mpu")
