"""DeepSpeed's engine as Megatron's schedule can drive it: everything that reaches into deepspeed 0.19 by name.

Only what chose this engine imports this module. Four things of deepspeed are changed, all of them here: three because they
are wrong with pipeline stages, one because it compiles for minutes.

* `assert_ints_same_as_other_ranks` compares the whole world, but stages hold different parameters. Ours compares replicas;
  it is patched in until the joined world is left.
* The post-backward state is cleared at a forward only, but 1F1B has backwards without a forward between. `Runtime`, a
  subclass of DeepSpeed's engine, clears it before each backward.
* The boundary of accumulation is counted in micro-batches that DeepSpeed must not know of (it would divide by their number
  once a stage). `Runtime` sets it for the last micro-batch's backward.
* On CPUs its communication builds a shared-memory kernel when it starts, which gloo does not need: patched out meanwhile.

The norm is computed by our engine (engine.py), since DeepSpeed's makes one collective over the model-parallel ranks for
each group of parameters, and stages may have different numbers of groups.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
os.environ.setdefault("LOCAL_RANK", "0")
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

from megadpo.platform.megatron_cpu import trackers_hidden  # noqa: E402

with trackers_hidden():
    import deepspeed
import torch.distributed as dist  # noqa: E402
from deepspeed.moe.utils import is_moe_param  # noqa: E402
from deepspeed.runtime.config import DeepSpeedConfig  # noqa: E402
from deepspeed.runtime.engine import DeepSpeedEngine  # noqa: E402
from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3  # noqa: E402
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION  # noqa: E402
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK, DeepSpeedZeRoOffload  # noqa: E402
from deepspeed.utils import groups  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from megadpo.errors import UserError  # noqa: E402
from megadpo.parallel.messages import gathered  # noqa: E402
from megadpo.platform.patches import patch, patches_undone, when_undone  # noqa: E402
from megadpo.platform.step_clock import part  # noqa: E402

TESTED = "0.19"
"""What is replaced below was read in this version."""

deepspeed.utils.logger.setLevel(logging.WARNING)


class ModelParallelUnit:
    """Megatron's groups under the names that DeepSpeed asks for.

    The model-parallel group is tensor x pipeline, but its rank is the tensor rank: DeepSpeed counts what is replicated
    over tensor ranks where that is 0, which must hold on every stage.
    """

    @staticmethod
    def get_model_parallel_rank() -> int:
        return parallel_state.get_tensor_model_parallel_rank()

    @staticmethod
    def get_model_parallel_group() -> dist.ProcessGroup:
        return parallel_state.get_model_parallel_group()

    @staticmethod
    def get_model_parallel_world_size() -> int:
        return dist.get_world_size(parallel_state.get_model_parallel_group())

    @staticmethod
    def get_data_parallel_rank() -> int:
        return dist.get_rank(data_parallel_group())

    @staticmethod
    def get_data_parallel_group() -> dist.ProcessGroup:
        return data_parallel_group()

    @staticmethod
    def get_data_parallel_world_size() -> int:
        return dist.get_world_size(data_parallel_group())

    @staticmethod
    def get_tensor_model_parallel_rank() -> int:
        return parallel_state.get_tensor_model_parallel_rank()

    @staticmethod
    def get_tensor_model_parallel_group() -> dist.ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    @staticmethod
    def get_tensor_model_parallel_world_size() -> int:
        return parallel_state.get_tensor_model_parallel_world_size()


def data_parallel_group() -> dist.ProcessGroup:
    """The ranks that hold the same parameters: what ZeRO shards over."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


EXPERTS = "experts"
"""The name under which DeepSpeed finds the groups of ranks of all mixtures."""
GROUP_OF_EXPERTS = {"moe": True, "name": EXPERTS}
"""What a group of an optimizer's parameters has where it holds experts, whose replicas are fewer, or other ranks."""


def prepare_deepspeed() -> None:
    """Take over torch's process group and put our comparison of replicas in place of the one of the world, until the joined
    world is left.

    Raises:
        UserError: a deepspeed whose insides were not looked at.
    """
    if not deepspeed.__version__.startswith(TESTED + "."):
        raise UserError(
            f"deepspeed {deepspeed.__version__} is installed, but this version of megadpo works with deepspeed {TESTED}; "
            f"install it with pip install 'deepspeed=={TESTED}.*'"
        )
    with patches_undone():
        # By name: as an attribute of the package, "torch" is torch itself.
        patch(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", _build_nothing)
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    for module in (partition_parameters, partitioned_param_coordinator, stage3):
        patch(module, "assert_ints_same_as_other_ranks", _assert_same_in_replicas)
    patch(groups, "mpu", ModelParallelUnit)  # as DeepSpeed's engine does, but for good
    patch(groups, "_EXPERT_PARALLEL_GROUP", {EXPERTS: parallel_state.get_expert_model_parallel_group()})
    patch(groups, "_EXPERT_DATA_PARALLEL_GROUP", {EXPERTS: parallel_state.get_expert_data_parallel_group()})
    when_undone(_forget_modules)


def _forget_modules() -> None:
    """What would keep the modules of a run that has ended: a list, and a cache of calls with modules in them."""
    FWD_MODULE_STACK.clear()
    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    cached = coordinator._PartitionedParameterCoordinator__params_to_release
    for cell in cached.__closure__ or ():  # wrapped once more, by a wrapper that does not say what it wraps
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()


def _build_nothing() -> None:
    """In place of a function that builds a kernel."""


def _assert_same_in_replicas(numbers: list[int]) -> None:
    # Ids count on from model to model in a process, and an earlier run may have left replicas with different counts.
    first = min(numbers, default=0)
    others = gathered([number - first for number in numbers], data_parallel_group())
    if any(other != others[0] for other in others):
        raise RuntimeError(f"replicas walk through different parameters: {others}")


class Chunks(torch.nn.Module):
    """The chunks of a pipeline stage as one module, of which a call runs one."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.chunks = torch.nn.ModuleList(chunks)

    def forward(self, *arguments: Any, chunk: int, **named: Any) -> Any:
        return self.chunks[chunk](*arguments, **named)


def as_one_module(chunks: Sequence[torch.nn.Module]) -> torch.nn.Module:
    """What DeepSpeed's engine is given: the only chunk, or all in one."""
    return chunks[0] if len(chunks) == 1 else Chunks(chunks)


class Runtime(DeepSpeedEngine):
    """DeepSpeed's engine with the boundary set by the number of the backward within a step."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> None:
        for parameter in model.parameters():
            if is_moe_param(parameter):
                setattr(parameter, "group_name", EXPERTS)  # noqa: B010
        # Stage 3 asks each parameter for its group; the others ask this, of what is trained. DeepSpeed knows experts by
        # modules of its own.
        stage = config["zero_optimization"]["stage"]
        self.has_experts = stage < 3 and any("moe" in group for group in optimizer.param_groups)
        super().__init__(
            args=None,
            model=model,
            optimizer=optimizer,
            mpu=ModelParallelUnit,
            dist_init_required=False,
            config=config,
            config_class=DeepSpeedConfig(config, ModelParallelUnit),
        )
        self.num_backwards_left = 0
        self.keeps_gradients = False
        """Leave the sum of the micro-batches' gradients where it is added up, instead of giving it to the optimizer."""
        if self.zero_optimization_stage() == 3:
            # Its only user divides the sum over replicas by this.
            self.optimizer._gradient_averaging_world_size = lambda *unused: 1
            self._share_fp32_weights()
        when_undone(self.destroy)

    @property
    def has_moe_layers(self) -> bool:
        return self.has_experts

    @has_moe_layers.setter
    def has_moe_layers(self, value: bool) -> None:
        """Not for DeepSpeed to say, which looks for its own modules."""

    def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> Any:
        # bf16 in stage 1 would get another optimizer class, whose state lies elsewhere.
        return ZERO_OPTIMIZATION if self.zero_optimization() else super()._do_optimizer_sanity_check(basic_optimizer)

    def _backward_prologue(self) -> None:
        self.optimizer.clear_backward_seen_flag()
        self.num_backwards_left -= 1
        self.set_gradient_accumulation_boundary(self.num_backwards_left == 0 and not self.keeps_gradients)
        super()._backward_prologue()

    def allreduce_gradients(self, *arguments: Any, **named: Any) -> None:
        with part("communication"):
            super().allreduce_gradients(*arguments, **named)

    def _share_fp32_weights(self) -> None:
        """Where parameters are fp32 already, the optimizer updates them in place; DeepSpeed means to, but compares a
        device with its name, and copies."""
        zero = self.optimizer
        if not zero.offload_optimizer:
            for updated, used in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True):
                if used is not None and used.dtype == updated.dtype and used.device == updated.device:
                    updated.data = used.data

    def use_norm(self, norm: float) -> None:
        """Let the next step take this as the global gradient norm, instead of computing one."""
        value = torch.tensor(norm, device=self.device)
        if self.zero_optimization_stage() == 3:
            self.optimizer._get_norm_groups = lambda: [value]
        else:
            self.optimizer.scaled_global_norm = lambda *unused: value

    def discard_gradients(self) -> None:
        """End a step without an update, as DeepSpeed does after an overflow: gradients are cleared, nothing else changes."""
        stage = self.zero_optimization_stage()
        if stage == 0:
            self.zero_grad()
            return
        self.use_norm(math.inf)
        if stage == 3:
            self.step()
            return
        looks_at_norm = self.optimizer.check_grad_overflow  # stages 1 and 2 take any norm for granted in bf16
        self.optimizer.check_grad_overflow = True
        self.step()
        self.optimizer.check_grad_overflow = looks_at_norm


def sharder(config: dict[str, Any], group: dist.ProcessGroup | None = None) -> Any:
    """What cuts a parameter for ZeRO-3 over `group` (None: the replicas); without a context, which would replace much of
    torch."""
    # Its argument dtype is taken for bf16 where fp16 is not supported; without, the configuration's is.
    return deepspeed.zero.Init(
        data_parallel_group=data_parallel_group() if group is None else group,
        config_dict_or_path=config,
        mem_efficient_linear=False,
    )


def gather_while_running(module: torch.nn.Module, config: dict[str, Any]) -> DeepSpeedZeRoOffload:
    """Hooks that gather the parameters of a frozen, sharded module around each submodule's forward."""
    zero = DeepSpeedConfig(config, ModelParallelUnit).zero_config
    hooks = DeepSpeedZeRoOffload(
        module,
        timers=deepspeed.utils.timer.NoopTimer(),
        ds_config=config,
        overlap_comm=zero.overlap_comm,
        prefetch_bucket_size=zero.prefetch_bucket_size,
        max_reuse_distance=zero.max_reuse_distance,
        max_live_parameters=zero.max_live_parameters,
        param_persistence_threshold=0,
        offload_param_config=zero.offload_param,
        mpu=ModelParallelUnit,
    )
    when_undone(hooks.destroy)
    return hooks


def read_elsewhere(module: torch.nn.Module, parameter: torch.nn.Parameter) -> None:
    """`module` reads a parameter that belongs to another module: gather it for `module` too."""
    deepspeed.zero.register_external_parameter(module, parameter)
