"""Where each ZeRO stage keeps a parameter's gradient, fp32 weights and moments on this rank.

A *partition* is (start, values): `values` is a flat view of this rank's part of a parameter, which begins at element `start`
of the flattened shard. What is written to it is what the optimizer reads.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megadpo.engine.base import MOMENTS
from megadpo.engine.deepspeed.runtime import Runtime
from megadpo.engine.lion import Lion

Partition = tuple[int, Tensor]


class Partitions(Protocol):
    """What the engine asks of a ZeRO stage: this rank's partition of a parameter, None where it has nothing of it."""

    def gradient(self, parameter: torch.nn.Parameter) -> Partition | None:
        """After all backwards: the gradient summed over replicas."""
        ...

    def weights(self, parameter: torch.nn.Parameter) -> Partition | None:
        """fp32 weights."""
        ...

    def moment(self, parameter: torch.nn.Parameter, kind: str) -> Partition | None:
        """One of the optimizer's moments; before the first step zeros that the optimizer does not read."""
        ...

    def make_moments(self, num_steps: int) -> None:
        """Allocate the optimizer's moments, to be written to, and set its count of steps."""
        ...

    def publish_weights(self) -> None:
        """Copy the fp32 weights to the model; collective."""
        ...

    def begin_sums(self) -> None:
        """Called before a step's first backward, where a backward is of one of several chunks: no sum has anything in it."""
        ...

    def before_step(self) -> None:
        """Called before a step, when the gradients are final."""
        ...


def partitions_of(runtime: Runtime) -> Partitions:
    """The partitions of the runtime's ZeRO stage."""
    stage = runtime.zero_optimization_stage()
    if stage == 0:
        return Unpartitioned(runtime)
    if stage < 3:
        return FlatGroupPartitions(runtime)
    return NvmeParameterPartitions(runtime) if runtime.optimizer.swap_optimizer else ParameterPartitions(runtime)


def _make_moments(optimizer: Any, keys: list[Tensor], num_steps: int) -> None:
    kinds: tuple[str, ...] = MOMENTS
    if isinstance(optimizer, torch.optim.SGD | Lion):
        momentum = optimizer.defaults.get("momentum")
        kinds = ("exp_avg",) if momentum is None else (("momentum_buffer",) if momentum else ())
    counts_in_python = not isinstance(optimizer, torch.optim.AdamW)
    for key in keys:
        step = num_steps if counts_in_python else torch.tensor(float(num_steps))
        optimizer.state[key] = {"step": step, **{kind: torch.zeros_like(key.data) for kind in kinds}}


def _moment(optimizer: Any, key: Tensor, kind: str) -> Tensor:
    found = optimizer.state.get(key, {}).get(kind)
    return torch.zeros_like(key.data) if found is None else found


class Unpartitioned:
    """Stage 0: every replica has all gradients and moments; in sums over the world one replica counts."""

    def __init__(self, runtime: Runtime) -> None:
        self.optimizer = runtime.optimizer

    def _partition(self, values: Tensor) -> Partition | None:
        return 0, values.view(-1)

    def gradient(self, parameter: torch.nn.Parameter) -> Partition | None:
        return None if parameter.grad is None else self._partition(parameter.grad)

    def weights(self, parameter: torch.nn.Parameter) -> Partition | None:
        return self._partition(parameter.data)

    def moment(self, parameter: torch.nn.Parameter, kind: str) -> Partition | None:
        return self._partition(_moment(self.optimizer, parameter, kind))

    def make_moments(self, num_steps: int) -> None:
        _make_moments(self.optimizer, [p for group in self.optimizer.param_groups for p in group["params"]], num_steps)

    def publish_weights(self) -> None:
        pass

    def begin_sums(self) -> None:
        pass

    def before_step(self) -> None:
        pass


class FlatGroupPartitions:
    """Stages 1 and 2: each parameter group is one flat tensor, partitioned evenly over the replicas."""

    def __init__(self, runtime: Runtime) -> None:
        self.zero = runtime.optimizer
        self.places: dict[torch.nn.Parameter, tuple[int, int]] = {}
        for group, (parameters, offsets) in enumerate(
            zip(self.zero.round_robin_bit16_groups, self.zero.round_robin_bit16_offsets, strict=True)
        ):
            self.places |= {parameter: (group, offset) for parameter, offset in zip(parameters, offsets, strict=True)}

    def _partition(self, parameter: torch.nn.Parameter, flats: list[Tensor]) -> Partition | None:
        group, offset = self.places[parameter]
        size = int(self.zero.partition_size[group])
        first = dist.get_rank(self.zero.real_dp_process_group[group]) * size
        begin, end = max(offset, first), min(offset + parameter.numel(), first + size)
        return None if begin >= end else (begin - offset, flats[group][begin - first : end - first])

    def _gradient_flats(self) -> list[Tensor]:
        """This rank's part of each group's gradient, as one tensor that the step will read."""
        if self.zero.cpu_offload:
            return [flat.grad for flat in self.zero.single_partition_of_fp32_groups]
        flats = []
        for group in range(len(self.zero.bit16_groups)):
            parts = self.zero.averaged_gradients[group]
            if len(parts) > 1 or parts[0].numel() != self.zero.partition_size[group]:
                flat = torch.cat([part.reshape(-1) for part in parts])
                flat = torch.nn.functional.pad(flat, (0, int(self.zero.partition_size[group]) - flat.numel()))
                self.zero.averaged_gradients[group] = parts = [flat]
            flats.append(parts[0].view(-1))
        return flats

    def gradient(self, parameter: torch.nn.Parameter) -> Partition | None:
        return self._partition(parameter, self._gradient_flats())

    def weights(self, parameter: torch.nn.Parameter) -> Partition | None:
        return self._partition(parameter, [flat.data for flat in self.zero.single_partition_of_fp32_groups])

    def moment(self, parameter: torch.nn.Parameter, kind: str) -> Partition | None:
        group, _ = self.places[parameter]
        flats: list[Any] = [None] * len(self.zero.bit16_groups)
        flats[group] = _moment(self.zero.optimizer, self.zero.single_partition_of_fp32_groups[group], kind)
        return self._partition(parameter, flats)

    def make_moments(self, num_steps: int) -> None:
        _make_moments(self.zero.optimizer, self.zero.single_partition_of_fp32_groups, num_steps)

    def publish_weights(self) -> None:
        self.zero.update_lp_params()

    def begin_sums(self) -> None:
        # On the host DeepSpeed writes over the last step's sums in the first backward, and adds in all others.
        for values in self.zero.accumulated_grads_in_cpu.values() if self.zero.cpu_offload else ():
            values.zero_()

    def before_step(self) -> None:
        pass


class ParameterPartitions:
    """Stage 3: each parameter is partitioned evenly over the replicas."""

    def __init__(self, runtime: Runtime) -> None:
        self.zero = runtime.optimizer

    def _partition(self, parameter: Any, part: Tensor) -> Partition | None:
        """`part` without the padding that the last replicas have."""
        start = dist.get_rank(parameter.ds_process_group) * part.numel()
        length = min(part.numel(), parameter.ds_numel - start)
        return None if length <= 0 else (start, part[:length])

    def gradient(self, parameter: torch.nn.Parameter) -> Partition | None:
        part, _ = self.zero._get_fp32_grad_state_partition(parameter, release_swap_buffers=True)
        return self._partition(parameter, part)

    def _place(self, parameter: torch.nn.Parameter) -> tuple[Tensor, slice]:
        group, offset, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
        return self.zero.fp32_partitioned_groups_flat[group], slice(offset, offset + length)

    def weights(self, parameter: torch.nn.Parameter) -> Partition | None:
        flat, place = self._place(parameter)
        return self._partition(parameter, flat.data[place])

    def moment(self, parameter: torch.nn.Parameter, kind: str) -> Partition | None:
        flat, place = self._place(parameter)
        return self._partition(parameter, _moment(self.zero.optimizer, flat, kind)[place])

    def make_moments(self, num_steps: int) -> None:
        _make_moments(self.zero.optimizer, self.zero.fp32_partitioned_groups_flat, num_steps)

    def publish_weights(self) -> None:
        self.zero._partition_all_parameters()
        for group in range(len(self.zero.fp16_groups)):
            self._publish(group)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def _publish(self, group: int) -> None:
        self.zero._reassign_or_swap_out_partitioned_parameters(group)

    def begin_sums(self) -> None:
        # DeepSpeed writes over the last step's sums in the first backward, here of one chunk, and adds in all others.
        self.zero.grad_partitions_flat_buffer.zero_()

    def before_step(self) -> None:
        pass


class NvmeParameterPartitions(ParameterPartitions):
    """Stage 3 with weights and moments in files (offload to NVMe), a sub-group of parameters at a time in memory.

    A partition is valid until one of another sub-group is asked for. Gradients stay in memory, where micro-batches are
    added up, until the step.
    """

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        self._runtime = runtime
        self._in_memory: int | None = None
        self._is_written = False

    def gradient(self, parameter: torch.nn.Parameter) -> Partition | None:
        sums = self.zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        return self._partition(parameter, sums[parameter.ds_id])  # type: ignore[attr-defined]

    def _place(self, parameter: torch.nn.Parameter) -> tuple[Tensor, slice]:
        self._swap_in(self.zero.grad_position[self.zero.get_param_id(parameter)][0])
        return super()._place(parameter)

    def make_moments(self, num_steps: int) -> None:
        self._is_written = True
        for group, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
            self._swap_in(group)
            _make_moments(self.zero.optimizer, [flat], num_steps)
            self._swap_out()

    def publish_weights(self) -> None:
        self._swap_out()
        self._is_written = False
        super().publish_weights()
        self._swap_out()

    def _publish(self, group: int) -> None:
        self._swap_in(group)
        super()._publish(group)

    def before_step(self) -> None:
        self._swap_out()
        self.zero._finalize_offload_gradient_accumulation()
        self._runtime.set_gradient_accumulation_boundary(True)

    def _swap_in(self, group: int) -> None:
        if group == self._in_memory:
            return
        self._swap_out()
        if self.zero._swappable_optimizer_subgroup(group):  # a small one is always in memory
            self.zero._optimizer_states_and_gradient_swap_in(group)
            self._in_memory = group

    def _swap_out(self) -> None:
        if self._in_memory is not None:
            if self._is_written:
                self.zero._optimizer_states_and_gradient_swap_out(self._in_memory)
            else:
                self.zero._release_swap_buffers(self._in_memory)
            self._in_memory = None
