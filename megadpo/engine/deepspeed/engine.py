"""The DeepSpeed engine: ZeRO stages 0 to 3 under Megatron's schedules, with tensor, sequence and pipeline parallelism.

DeepSpeed reduces gradients over the replicas, shards over them, and steps. What it does not know of is done here on the
reduced gradients: those of sequence-parallel norms are summed over tensor ranks, those of tied embeddings over the first and
the last stage; then comes the global norm, in which what is replicated counts once, and the clipping.

A tied embedding is a parameter group of its own, so that both stages partition it over the replicas in the same way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from torch import Tensor

from megadpo.config.schema import ModelConfig, ParallelConfig, TrainConfig
from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.engine.deepspeed.offload import (
    begin_bias_correction_anew,
    cpu_adam,
    own_directory,
    require_async_io,
    require_lockable,
)
from megadpo.engine.deepspeed.partitions import Partition, Unpartitioned, partitions_of
from megadpo.engine.deepspeed.runtime import (
    GROUP_OF_EXPERTS,
    Chunks,
    Runtime,
    as_one_module,
    gather_while_running,
    prepare_deepspeed,
    read_elsewhere,
    sharder,
)
from megadpo.engine.megatron_optimizer import is_first_replica, replicas_of
from megadpo.engine.optimizer import make_rule
from megadpo.engine.parameter_groups import kept_of, settings_of
from megadpo.model.activations import KEEP, Activations
from megadpo.model.adapters.spec import AdapterSpec
from megadpo.model.build import Stage, build_stage
from megadpo.model.families import ParameterShard, TensorSource, names_in
from megadpo.model.families.fill import fill_shard
from megadpo.model.moe.layer import is_expert
from megadpo.model.router_load import RouterWatch, balance_metrics, move_correction_biases, watch_of, watch_step
from megadpo.model.routes import Routes
from megadpo.model.shape import ModelShape
from megadpo.model.weights import load_weights
from megadpo.parallel.layout import Layout
from megadpo.parallel.zero3 import set_whole, whole
from megadpo.pipeline.base import PipelineSchedule
from megadpo.pipeline.select import pipeline_schedule
from megadpo.pipeline.stage_ops import ResponseGradient
from megadpo.platform import step_clock
from megadpo.platform.device import compute_device
from megadpo.validation.deepspeed import engine_config, swap_to_directory


class ZeroEngine:
    """See `megadpo.engine.base.Engine`."""

    def __init__(
        self, stage: Stage, train: TrainConfig, parallel: ParallelConfig, schedule: PipelineSchedule | None = None
    ) -> None:
        """`stage` is loaded; for ZeRO stage 3 by `sharded_stage`. No `schedule`: Megatron's."""
        prepare_deepspeed()
        self.stage, self.train, self.parallel = stage, train, parallel
        self.schedule = pipeline_schedule() if schedule is None else schedule
        self._shapes = {name: shard.shape for name, (_, shard) in stage.parameters.items()}
        adam = cpu_adam() if train.optimizer == "adamw" and parallel.offload != "none" else None
        config = _config(stage, parallel, adam is not None)
        self.runtime = Runtime(as_one_module(stage.models), _optimizer(stage, train, adam), config)
        self.partitions = partitions_of(self.runtime)
        stage.configure_head(gradient_buffer=self.gradient_buffer)
        self.models = _scheduled(self.runtime, runs_hooks=parallel.zero_stage > 0)
        self.watch: RouterWatch | None = None
        self.routes: Routes | None = None

    def forward(self, micro_batches: Sequence[MicroBatch], ld_alpha: float | None = None) -> list[Tensor]:
        watch = None
        if self.routes is not None:
            watch = watch_of(self.stage.models[0].config, compute_device(), replays=self.routes.of(micro_batches))
        return self.schedule.forward_only(_scheduled(self.runtime, runs_hooks=False), micro_batches, ld_alpha, watch)

    def forward_backward(
        self,
        micro_batches: Sequence[MicroBatch],
        response_gradient: ResponseGradient,
        ld_alpha: float | None = None,
    ) -> None:
        num_backwards = sum(len(micro_batch.halves) or 1 for micro_batch in micro_batches)
        self.runtime.num_backwards_left = num_backwards * len(self.models)
        if len(self.models) > 1:
            self.partitions.begin_sums()
        hands_over_later = self.parallel.offload == "cpu" and self.parallel.zero_stage >= 2 and len(self.models) > 1
        self.runtime.keeps_gradients = hands_over_later or self.parallel.offload == "nvme"
        self.watch = watch_step(
            self.stage.models[0].config,
            compute_device(),
            self.train.router_aux_coef,
            lambda counting: self.schedule.forward_only(
                _scheduled(self.runtime, runs_hooks=False), micro_batches, ld_alpha, counting
            ),
            None if self.routes is None else self.routes.of(micro_batches),
        )
        self.schedule.forward_backward(self.models, micro_batches, response_gradient, ld_alpha, self.watch)
        if hands_over_later:
            # In the last backward, which is of one chunk, that chunk's gradients alone would go to the host.
            self.runtime.optimizer.finalize_gradient_accumulation_boundary()
            self.runtime.set_gradient_accumulation_boundary(True)
        if self.parallel.zero_stage == 0:
            self.runtime.set_gradient_accumulation_boundary(True)
            self.runtime.allreduce_gradients()

    def gradient_buffer(self, parameter: Any) -> Tensor | None:
        """`.grad` where nothing is sharded and nothing rounded; elsewhere DeepSpeed takes gradients from autograd."""
        if self.parallel.zero_stage > 0 or parameter.dtype is not torch.float32:
            return None
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def router_metrics(self) -> dict[str, float]:
        return balance_metrics(self.stage.correction_biases, self.watch, self.train.router_bias_update_rate)

    def finish_gradients(self) -> None:
        owned = {name: self.partitions.gradient(parameter) for name, (parameter, _) in self.stage.parameters.items()}
        partial = [part[1] for name, part in owned.items() if part is not None and self._is_partial_over_tensor_ranks(name)]
        _all_reduce_together(partial, parallel_state.get_tensor_model_parallel_group())
        for name, (parameter, _) in self.stage.parameters.items():
            part = owned[name]
            if getattr(parameter, "shared_embedding", False) and part is not None:
                dist.all_reduce(part[1], group=parallel_state.get_embedding_group())

    def step(self, learning_rate: float, accepts: Callable[[float], bool] | None = None) -> float:
        norm = self._norm()
        if accepts is None and not math.isfinite(norm):
            raise ArithmeticError(f"the gradient norm is {norm}")
        if accepts is not None and not accepts(norm):
            self.partitions.before_step()
            self.runtime.discard_gradients()
            return norm
        if self.train.clip_norm > 0 and (factor := self.train.clip_norm / (norm + 1e-6)) < 1:
            for parameter, _ in self.stage.parameters.values():
                part = self.partitions.gradient(parameter)
                if part is not None:
                    part[1].mul_(factor)
        for group in self.runtime.optimizer.param_groups:
            group["lr"] = learning_rate * group["factor"]
        self.runtime.use_norm(norm)
        self.partitions.before_step()
        begin_bias_correction_anew(self.runtime.basic_optimizer)
        self.runtime.step()
        move_correction_biases(self.stage.correction_biases, self.watch, self.train.router_bias_update_rate)
        return norm

    def wait_for_parameters(self) -> None:
        """Nothing to wait for: a step ends with the gather."""

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, (parameter, _) in self.stage.parameters.items():
            yield name, self._join(name, self.partitions.gradient(parameter))

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, (parameter, _) in self.stage.held.items():
            yield name, whole(parameter)

    def state(self, kinds: Sequence[str] | None = None) -> Iterator[tuple[str, str, Tensor]]:
        for name, (parameter, shard) in self.stage.held.items():
            kept = ("weights", *kept_of(shard, self.train))
            for kind in (kind for kind in kept if kinds is None or kind in kinds):
                if name in self.stage.parameters:
                    yield kind, name, self._join(name, self._part(parameter, kind))
                else:
                    yield kind, name, whole(parameter).float().clone()

    def _part(self, parameter: torch.nn.Parameter, kind: str) -> Partition | None:
        return self.partitions.weights(parameter) if kind == "weights" else self.partitions.moment(parameter, kind)

    def own_state(self) -> Iterator[tuple[str, ParameterShard, int, Tensor]]:
        for parameter, shard in self.stage.parameters.values():
            for kind in ("weights", *kept_of(shard, self.train)):
                part = self._part(parameter, kind)
                if part is not None:
                    yield kind, shard, *part

    def own_gradients(self) -> Iterator[tuple[str, ParameterShard, int, Tensor]]:
        for parameter, shard in self.stage.parameters.values():
            part = self.partitions.gradient(parameter)
            if part is not None:
                yield "gradient", shard, *part

    def load_state(self, read: Callable[[str, str], Tensor], num_steps: int) -> None:
        self.partitions.make_moments(num_steps)
        with torch.no_grad():
            for name, (parameter, shard) in self.stage.held.items():
                if name not in self.stage.parameters:
                    set_whole(parameter, read("weights", name))
                    continue
                _write(self.partitions.weights(parameter), read("weights", name))
                for kind in kept_of(shard, self.train):
                    _write(self.partitions.moment(parameter, kind), read(kind, name))
            self.partitions.publish_weights()

    def describe(self) -> dict[str, Any]:
        optimizer = type(self.runtime.basic_optimizer)
        offload = "" if self.parallel.offload == "none" else f", offload {self.parallel.offload}"
        return {
            "engine": f"deepspeed ZeRO-{self.parallel.zero_stage}{offload}",
            "optimizer": f"{optimizer.__module__}.{optimizer.__name__}",
        }

    def _is_partial_over_tensor_ranks(self, name: str) -> bool:
        """Whether each tensor rank has the gradient of its own tokens or heads only (norms)."""
        config, parameter = self.stage.models[0].config, self.stage.parameters[name][0]
        by_tokens = config.sequence_parallel and getattr(parameter, "sequence_parallel", False)
        by_heads = config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
        return bool(by_tokens or by_heads)

    def _norm(self) -> float:
        """Global norm: over tensor and pipeline ranks and replicas, replicated parameters counted once."""
        total = torch.zeros((), dtype=torch.float32, device=compute_device())
        is_partitioned = not isinstance(self.partitions, Unpartitioned)
        for parameter, _ in self.stage.parameters.values():
            part = self.partitions.gradient(parameter)
            is_copy = getattr(parameter, "shared", False) or not (is_partitioned or is_first_replica(parameter))
            if part is not None and not is_copy and param_is_not_tensor_parallel_duplicate(parameter):
                total += torch.linalg.vector_norm(part[1].float()).to(total.device) ** 2
        with step_clock.part("communication"):
            dist.all_reduce(total)
        return math.sqrt(float(total))

    def _join(self, name: str, part: Partition | None) -> Tensor:
        """A shard-shaped fp32 tensor from the partitions on the replicas, bit for bit."""
        if isinstance(self.partitions, Unpartitioned):
            assert part is not None
            return part[1].detach().clone().view(self._shapes[name])
        group = replicas_of(self.stage.parameters[name][0])
        joined = torch.zeros(math.prod(self._shapes[name]), dtype=torch.float32, device=compute_device())
        if part is not None:
            start, values = part
            joined[start : start + values.numel()] = values.detach()
        # Each element is set on one rank only; added as integers, even the sign of a zero survives.
        dist.all_reduce(joined.view(torch.int32), group=group)
        return joined.view(self._shapes[name])


def policy_stage(
    shape: ModelShape,
    source: TensorSource,
    layout: Layout,
    dtype: torch.dtype,
    activations: Activations,
    parallel: ParallelConfig,
    options: ModelConfig | None = None,
    adapter: AdapterSpec | None = None,
    trained: TensorSource | None = None,
) -> Stage:
    """The loaded stage that `ZeroEngine` takes: in stage 3 every parameter is sharded as soon as it is read.

    Args:
        adapter, trained: adapters, and where they are read from.
    """
    if parallel.zero_stage < 3:
        stage = build_stage(shape, layout, dtype, activations, options=options, adapter=adapter)
        load_weights(stage, source, trained)
        return stage
    return sharded_stage(shape, source, layout, dtype, activations, parallel, options, adapter=adapter, trained=trained)


def frozen_sharded_stage(
    shape: ModelShape,
    source: TensorSource,
    layout: Layout,
    dtype: torch.dtype,
    parallel: ParallelConfig,
    options: ModelConfig | None = None,
) -> Stage:
    """The reference of a ZeRO-3 run: sharded like the policy, gathered module by module while it runs."""
    stage = sharded_stage(shape, source, layout, dtype, KEEP, parallel, options, "reference")
    model = as_one_module(stage.models)
    model.requires_grad_(False)
    model.eval()
    stage.configure_head(statistics=("logp",))
    gather_while_running(model, _config(stage, parallel, ds_cpu_adam=False, role="reference"))
    return stage


def sharded_stage(
    shape: ModelShape,
    source: TensorSource,
    layout: Layout,
    dtype: torch.dtype,
    activations: Activations,
    parallel: ParallelConfig,
    options: ModelConfig | None = None,
    role: str = "policy",
    adapter: AdapterSpec | None = None,
    trained: TensorSource | None = None,
) -> Stage:
    """A stage made without memory; then each parameter is read and cut, so that only one at a time is whole.

    `role` keeps the files of two models apart where parameters are offloaded to a directory.
    """
    prepare_deepspeed()
    if parallel.offload == "nvme":
        require_async_io()
    meta = torch.device("meta")
    stage = build_stage(shape, layout, dtype, activations, device=meta, options=options, adapter=adapter)
    config = _config(stage, parallel, ds_cpu_adam=False, role=role)
    cut, cut_of_experts = sharder(config), sharder(config, parallel_state.get_expert_data_parallel_group())
    parameters: dict[str, tuple[torch.nn.Parameter, ParameterShard]] = {}
    base: dict[str, tuple[torch.nn.Parameter, ParameterShard]] = {}
    for bias, shard in stage.correction_biases.values():
        fill_shard(shard, source, bias.data)
    for values, held, filled in ((source, stage.base, base), (trained or source, stage.parameters, parameters)):
        for name, (empty, shard) in held.items():
            data = torch.empty(shard.shape, dtype=empty.dtype, device=compute_device())
            parameter = torch.nn.Parameter(data, empty.requires_grad)
            parameter.__dict__.update(empty.__dict__)
            with torch.no_grad():
                fill_shard(shard, values, parameter.data)
            _put_in_place(stage.models, empty, parameter)
            (cut_of_experts if is_expert(name) else cut)._convert_to_zero_parameters([parameter])
            filled[name] = (parameter, shard)
        values.release()
    assert not any(tensor.is_meta for model in stage.models for tensor in model.buffers())
    first, last = stage.models[0], stage.models[-1]
    if last.post_process and last.output_layer.weight is None:
        read_elsewhere(last.output_layer, first.embedding.word_embeddings.weight)
    return replace(stage, parameters=parameters, base=base, held={})


def _put_in_place(models: Sequence[torch.nn.Module], old: torch.nn.Parameter, new: torch.nn.Parameter) -> None:
    for module in (module for model in models for module in model.modules()):
        for name, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[name] = new


class _ScheduledModel(torch.nn.Module):
    """DeepSpeed's engine with the attributes of a model that pipeline schedules read: those of a chunk of the stage.

    A module, as Megatron's interleaved schedule wants, but without parameters: those are DeepSpeed's engine's.
    """

    module: Any

    def __init__(self, chunk: Any, run: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__["module"] = chunk  # not as a part of this one
        self.config, self.model_type = chunk.config, getattr(chunk, "model_type", None)
        self.__dict__["_run"] = run

    def forward(self, *arguments: Any, **named: Any) -> Any:
        run: Callable[..., Any] = self.__dict__["_run"]
        return run(*arguments, **named)

    def set_input_tensor(self, tensor: Any) -> None:
        self.module.set_input_tensor(tensor)


def _scheduled(runtime: Runtime, runs_hooks: bool) -> list[_ScheduledModel]:
    """The chunks of the stage. `runs_hooks`: call DeepSpeed's engine, whose hooks then see the backward too; ZeRO stage 0
    needs none."""
    run: Any = runtime if runs_hooks else runtime.module
    if not isinstance(runtime.module, Chunks):
        return [_ScheduledModel(runtime.module, run)]
    # Forwards without gradients, too, go by the module of all chunks: there DeepSpeed begins its list of modules anew.
    return [
        _ScheduledModel(chunk, functools.partial(run, chunk=number)) for number, chunk in enumerate(runtime.module.chunks)
    ]


def _config(stage: Stage, parallel: ParallelConfig, ds_cpu_adam: bool, role: str = "policy") -> dict[str, Any]:
    sizes = [math.prod(shard.shape) for _, shard in (stage.base | stage.parameters).values()]
    config = engine_config(parallel, stage.models[0].config.params_dtype, sum(sizes), ds_cpu_adam)
    if parallel.offload == "nvme":
        assert parallel.offload_dir is not None, "config_check refuses it"
        parts = [
            -(-math.prod(shard.shape) // dist.get_world_size(replicas_of(parameter)))
            for parameter, shard in (stage.base | stage.parameters).values()
        ]
        directory = str(own_directory(parallel.offload_dir) / role)
        require_lockable(swap_to_directory(config, directory, max(parts), sum(parts)))
    return config


def _optimizer(stage: Stage, train: TrainConfig, adam: Any) -> torch.optim.Optimizer:
    """The optimizer of `train.optimizer`, on groups of parameters that are updated alike, and tied embeddings apart.

    A group is one flat tensor to DeepSpeed, so that a parameter that holds several Hugging Face tensors is treated as one.
    """
    groups: dict[tuple[bool, bool, bool, float], list[torch.nn.Parameter]] = {}
    for name, (parameter, shard) in stage.parameters.items():
        (settings,) = {settings_of(logical, len(shard.shape), train) for logical in names_in(shard)}
        place = settings.decays, getattr(parameter, "shared_embedding", False), is_expert(name), settings.factor
        groups.setdefault(place, []).append(parameter)
    options = [
        {
            "params": parameters,
            "weight_decay": train.weight_decay if decays else 0.0,
            "factor": factor,
            "lr": train.learning_rate * factor,
            **(GROUP_OF_EXPERTS if of_experts else {}),
        }
        for (decays, _, of_experts, factor), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
    if train.optimizer != "adamw":
        return make_rule(train.optimizer, options, train)
    settings_of_adam: dict[str, Any] = {"lr": train.learning_rate, "betas": train.betas, "eps": train.eps}
    if adam is not None:
        return adam(options, **settings_of_adam, adamw_mode=True)
    return torch.optim.AdamW(options, **settings_of_adam, fused=True)


def _all_reduce_together(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sum over the group in one go; every rank of it has the same shapes."""
    if not tensors or dist.get_world_size(group) == 1:
        return
    flat = torch.cat(tensors)
    dist.all_reduce(flat, group=group)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed)


def _write(part: Partition | None, whole_values: Tensor) -> None:
    """Set a partition from the values of the whole parameter."""
    if part is not None:
        start, values = part
        values.copy_(whole_values.reshape(-1)[start : start + values.numel()])
