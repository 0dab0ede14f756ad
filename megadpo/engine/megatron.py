"""The Megatron engine: DistributedDataParallel and DistributedOptimizer (ZeRO-1) under Megatron's schedules."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor

from megadpo.config.schema import ParallelConfig, TrainConfig
from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.engine.bf16_moments import NarrowAdamW
from megadpo.model.build import Stage
from megadpo.model.moe.load import RouterWatch
from megadpo.model.weight_gradients import choose_fusion, fuse_gradients
from megadpo.pipeline.base import PipelineSchedule
from megadpo.pipeline.select import pipeline_schedule
from megadpo.pipeline.stage_ops import ResponseGradient
from megadpo.platform.device import compute_device
from megadpo.platform.megatron_cpu import cpu_tensors_pass_for_cuda

STATE_KINDS = ("weights", "exp_avg", "exp_avg_sq")

BUCKET_ELEMENTS: int | None = None
"""Gradients that are summed in one go with `parallel.overlap`; None: as Megatron chooses, 40 million or more."""


class MegatronEngine:
    """See `megadpo.engine.base.Engine`."""

    def __init__(
        self,
        stage: Stage,
        train: TrainConfig,
        parallel: ParallelConfig | None = None,
        schedule: PipelineSchedule | None = None,
    ) -> None:
        """Of `parallel`, `overlap`, `offload` and `gradient_accumulation_fusion` are read here; None: the defaults, and
        Megatron's schedule."""
        parallel = ParallelConfig() if parallel is None else parallel
        self.schedule = pipeline_schedule() if schedule is None else schedule
        self.stage = stage
        self.train = train
        self.overlap = torch.cuda.is_available() if parallel.overlap is None else parallel.overlap
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=self.overlap,
            overlap_param_gather=self.overlap,
            bucket_size=BUCKET_ELEMENTS,
        )
        self.models = [DistributedDataParallel(model.config, ddp, model) for model in stage.models]
        if not self.overlap:
            _send_nothing_to_oneself(self.models)
        stage.configure_head(gradient_buffer=self.gradient_buffer)
        params_dtype = stage.models[0].config.params_dtype
        requested = True if self.schedule.delays_weight_gradients else parallel.gradient_accumulation_fusion
        self.fusion = choose_fusion(requested, compute_device(), params_dtype, stage.layers.kind)
        fuse_gradients(stage.models, self.fusion)
        if self.overlap:
            # How the schedules say which micro-batch is the last one, in whose backward pass gradients are finished.
            waits = [model.no_sync for model in self.models]
            stage.models[0].config.no_sync_func = waits if len(waits) > 1 else waits[0]
        config = OptimizerConfig(
            optimizer="adam",
            lr=train.learning_rate,
            weight_decay=train.weight_decay,
            adam_beta1=train.betas[0],
            adam_beta2=train.betas[1],
            adam_eps=train.eps,
            clip_grad=train.clip_norm,
            bf16=params_dtype is torch.bfloat16,
            params_dtype=params_dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=self.overlap,
            optimizer_cpu_offload=parallel.offload == "cpu",
            optimizer_offload_fraction=1.0,
            overlap_cpu_optimizer_d2h_h2d=True,
        )
        with cpu_tensors_pass_for_cuda(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.optimizer = get_megatron_optimizer(config, self.models, use_gloo_process_groups=False)
        # One distributed optimizer for what is replicated over data-parallel ranks, and one for experts, whose replicas
        # are fewer: either may be missing on a stage.
        self.shards = list(self.optimizer.chained_optimizers)
        self.watch: RouterWatch | None = None
        if train.moments_dtype == "bf16":
            for shards in self.shards:
                shards.optimizer = NarrowAdamW.in_place_of(shards.optimizer)
        elif isinstance(self.shards[0].optimizer, torch.optim.AdamW):
            # One pass over the memory instead of a dozen; Megatron leaves torch's choice, which on a CPU is a loop.
            for group in self.optimizer.param_groups:
                group["fused"] = True
        self._clear_gradients()

    def forward(self, micro_batches: Sequence[MicroBatch], ld_alpha: float | None = None) -> list[Tensor]:
        return self.schedule.forward_only(self.models, micro_batches, ld_alpha)

    def forward_backward(
        self,
        micro_batches: Sequence[MicroBatch],
        response_gradient: ResponseGradient,
        ld_alpha: float | None = None,
    ) -> None:
        self.watch = self._new_watch()
        if self.watch is not None and self.train.router_aux_coef > 0:
            counting = self._new_watch()
            self.schedule.forward_only(self.models, micro_batches, ld_alpha, counting)
            assert counting is not None
            self.watch.whole = counting.load()
        self.schedule.forward_backward(self.models, micro_batches, response_gradient, ld_alpha, self.watch)

    def gradient_buffer(self, parameter: Any) -> Tensor | None:
        """Megatron's `main_grad`, float32. Its hook adds on what autograd brings besides (a tied embedding's part)."""
        if self.overlap and not getattr(parameter, "zero_out_wgrad", False):
            # The hook that starts the reduction wants to see a gradient, and a mark that it is added already. Where an
            # embedding on this stage is tied to it (Megatron marks that so), that one brings a gradient.
            parameter.grad = parameter.new_zeros(()).expand_as(parameter)
            parameter.grad_added_to_main_grad = True
        return parameter.main_grad

    def router_metrics(self) -> dict[str, float]:
        return {} if self.watch is None else self.watch.load().metrics()

    def _new_watch(self) -> RouterWatch | None:
        config = self.stage.models[0].config
        if config.num_moe_experts is None:
            return None
        return RouterWatch(
            config.num_layers,
            config.num_moe_experts,
            config.moe_router_topk,
            compute_device(),
            self.train.router_aux_coef,
        )

    def finish_gradients(self) -> None:
        # num_tokens=None: the pair weights in the loss are exact already, nothing more is divided.
        finalize_model_grads(self.models, num_tokens=None)

    def step(self, learning_rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = self.train.weight_decay * group.get("wd_mult", 1.0)
        with cpu_tensors_pass_for_cuda():
            self.optimizer.prepare_grads()
            norm = float(self.optimizer.get_grad_norm())
            if not math.isfinite(norm):
                raise ArithmeticError(f"the gradient norm is {norm}")
            if self.train.clip_norm > 0:
                for shards in self.shards:
                    clip_grad_by_total_norm_fp32(shards.get_parameters(), self.train.clip_norm, norm)
            self.optimizer.step_with_ready_grads()
        self._clear_gradients()
        self.optimizer.zero_grad()
        return norm

    def _clear_gradients(self) -> None:
        for model in self.models:
            model.zero_grad_buffer()

    def settle(self) -> None:
        if self.overlap:  # else a step ends when they are there
            for model in self.models:
                model.start_param_sync(force_sync=True)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, (parameter, _) in self.stage.parameters.items():
            piece = self._piece(parameter)
            own = None if piece is None else getattr(parameter, "main_grad").view(-1)[piece]  # noqa: B009
            yield name, _join_over_data(parameter, piece, own)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        self.settle()
        for name, (parameter, _) in self.stage.parameters.items():
            yield name, parameter.data

    def state(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, (parameter, _) in self.stage.parameters.items():
            piece = self._piece(parameter)
            tensors = {} if piece is None else self._main_state(parameter)
            for kind in STATE_KINDS:
                yield kind, name, _join_over_data(parameter, piece, tensors.get(kind))

    def load_state(self, read: Callable[[str, str], Tensor], num_steps: int) -> None:
        with torch.no_grad():
            for name, (parameter, _) in self.stage.parameters.items():
                weights = read("weights", name)
                parameter.data.copy_(weights)
                piece = self._piece(parameter)
                if piece is None:
                    continue
                main = self._main_parameter(parameter)
                main.data.copy_(weights.view(-1)[piece])
                moments = {kind: read(kind, name).view(-1)[piece].to(main.device) for kind in STATE_KINDS[1:]}
                optimizer = self._shards_of(parameter).optimizer
                _set_moments(optimizer, main, {kind: moment.clone() for kind, moment in moments.items()}, num_steps)

    def describe(self) -> dict[str, Any]:
        optimizer = self.shards[0].optimizer
        return {
            "engine": "megatron",
            "optimizer": f"{type(optimizer).__module__}.{type(optimizer).__name__}",
            "gradient accumulation fusion": self.fusion,
        }

    def _piece(self, parameter: torch.nn.Parameter) -> slice | None:
        """The part of the flattened parameter whose optimizer state lies on this data-parallel rank."""
        shards = self._shards_of(parameter)
        if shards is None:
            return None
        owned = shards._get_model_param_range_map(parameter)["param"]
        return slice(owned.start, owned.end)

    def _shards_of(self, parameter: torch.nn.Parameter) -> Any:
        """The distributed optimizer that has a piece of the parameter on this rank; None where others have all of it."""
        return next((shards for shards in self.shards if parameter in shards.model_param_group_index_map), None)

    def _main_parameter(self, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        shards = self._shards_of(parameter)
        group, order = shards.model_param_group_index_map[parameter]
        return shards.optimizer.param_groups[group]["params"][order]

    def _main_state(self, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
        """The owned piece of fp32 weights and moments; the moments are zeros before the first step."""
        main = self._main_parameter(parameter)
        moments = self._shards_of(parameter).optimizer.state.get(main, {})
        zeros = torch.zeros_like(main, dtype=torch.float32)
        return {"weights": main.detach(), **{kind: moments.get(kind, zeros) for kind in STATE_KINDS[1:]}}


def _set_moments(optimizer: Any, main: torch.nn.Parameter, moments: dict[str, Tensor], num_steps: int) -> None:
    """`main` has its weights already."""
    if isinstance(optimizer, HybridDeviceOptimizer):
        _set_offloaded(optimizer, main, moments, num_steps)
    elif isinstance(optimizer, torch.optim.AdamW):
        dtype = torch.bfloat16 if isinstance(optimizer, NarrowAdamW) else torch.float32
        stored = {kind: moment.to(dtype) for kind, moment in moments.items()}
        optimizer.state[main] = {"step": torch.tensor(float(num_steps), device=main.device), **stored}
    else:  # TransformerEngine's and Apex's FusedAdam count steps in the group.
        optimizer.state[main] = moments
        for group in optimizer.param_groups:
            group["step"] = num_steps


def _set_offloaded(
    optimizer: HybridDeviceOptimizer, main: torch.nn.Parameter, moments: dict[str, Tensor], num_steps: int
) -> None:
    """The weights and moments that are updated are on the host, each parameter's in an optimizer of its own."""
    copy = optimizer.gpu_params_map_cpu_copy[main]
    copy.data.copy_(main.data)
    (updates,) = (one for one in optimizer.cpu_optimizers if one.param_groups[0]["params"][0] is copy)
    updates.state[copy] = {"step": torch.tensor(float(num_steps)), **{kind: m.cpu() for kind, m in moments.items()}}
    optimizer.state[main] = updates.state[copy]


def replicas_of(parameter: torch.nn.Parameter) -> dist.ProcessGroup:
    """The ranks that hold the same shard of a parameter: experts have fewer replicas."""
    if getattr(parameter, "allreduce", True):
        return parallel_state.get_data_parallel_group(with_context_parallel=True)
    return parallel_state.get_expert_data_parallel_group()


def is_first_replica(parameter: torch.nn.Parameter) -> bool:
    """Whether this rank is the first of `replicas_of` a parameter."""
    return dist.get_rank(replicas_of(parameter)) == 0


def _send_nothing_to_oneself(models: Sequence[DistributedDataParallel]) -> None:
    """No collectives over a single replica: in gloo each copies the whole buffer, the weights' through fresh memory."""
    for group in (group for model in models for group in model.bucket_groups + model.expert_parallel_bucket_groups):
        if group.intra_distributed_optimizer_instance_size == 1:
            group.start_param_sync = lambda force_sync=False: None
            if all(bucket.gradient_scaling_factor == 1 for bucket in group.buckets):
                group.start_grad_sync = lambda force_all_reduce=False: None


def _join_over_data(parameter: torch.nn.Parameter, piece: slice | None, own: Tensor | None) -> Tensor:
    """A parameter-shaped fp32 tensor from the pieces on the data-parallel ranks, bit for bit."""
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    if piece is not None and own is not None:
        whole[piece] = own
    group = replicas_of(parameter)
    if dist.get_world_size(group) > 1:
        # Each element is set on one rank only; added as integers, even the sign of a zero survives.
        dist.all_reduce(whole.view(torch.int32), group=group)
    return whole.view(parameter.shape)
