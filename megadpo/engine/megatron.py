"""The Megatron engine: DistributedDataParallel and DistributedOptimizer (ZeRO-1) under Megatron's schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import Tensor
from torch.nn.utils import get_total_norm

from megadpo.config.schema import ParallelConfig, TrainConfig
from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.engine.megatron_optimizer import choose_adamw, distributed_optimizer, muon_shard, pieces_of, replicas_of
from megadpo.engine.muon import Muon, MuonShard
from megadpo.engine.optimizer import OverPieces, Piece, moments_of, set_moments
from megadpo.engine.parameter_groups import is_plain, kept_of, runs_of
from megadpo.model.build import Stage
from megadpo.model.families import ParameterShard
from megadpo.model.router_load import RouterWatch, balance_metrics, move_correction_biases, watch_of, watch_step
from megadpo.model.routes import Routes
from megadpo.model.weight_gradients import choose_fusion, fuse_gradients
from megadpo.pipeline.base import PipelineSchedule
from megadpo.pipeline.select import pipeline_schedule
from megadpo.pipeline.stage_ops import ResponseGradient
from megadpo.platform.device import compute_device
from megadpo.platform.megatron_cpu import cpu_tensors_pass_for_cuda
from megadpo.platform.patches import when_undone
from megadpo.platform.step_clock import part

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
        """Of `parallel`, `overlap`, `offload`, `gradient_dtype` and `gradient_accumulation_fusion` are read here; None: the
        defaults, and Megatron's schedule."""
        parallel = ParallelConfig() if parallel is None else parallel
        self.stage, self.train = stage, train
        self.schedule = pipeline_schedule() if schedule is None else schedule
        self.overlap = torch.cuda.is_available() if parallel.overlap is None else parallel.overlap
        self.gradient_dtype = torch.bfloat16 if parallel.gradient_dtype == "bf16" else torch.float32
        self.models = _data_parallel(stage, self.overlap, self.gradient_dtype)
        self.fusion = self._fuse_weight_gradients(parallel.gradient_accumulation_fusion)
        self.optimizer = distributed_optimizer(self.models, train, self.overlap)
        # One distributed optimizer for what is replicated over data-parallel ranks, and one for experts, whose replicas
        # are fewer: either may be missing on a stage.
        self.optimizers = list(self.optimizer.chained_optimizers)
        self._choose_rules("host" if parallel.offload == "cpu" else train.moments_dtype)
        self.watch: RouterWatch | None = None
        self.routes: Routes | None = None
        self._clear_gradients()
        when_undone(self._break_circles)

    def _break_circles(self) -> None:
        """Where Python's collector does not see them: in autograd's nodes, whose hooks refer to the model, and which the
        optimizer's views of parameters hold. An ended run would keep its memory, and its groups their threads."""
        for model in self.models:
            model.grad_accs.clear()
        self.optimizers.clear()
        del self.optimizer

    def _fuse_weight_gradients(self, requested: bool | None) -> str:
        """Have products of head and linear layers add to `main_grad`; which ones do in the linear layers."""
        self.stage.configure_head(gradient_buffer=self.gradient_buffer)
        if self.schedule.delays_weight_gradients:
            requested = True
        params_dtype = self.stage.models[0].config.params_dtype
        fusion = choose_fusion(requested, compute_device(), params_dtype, self.stage.layers.kind, self.gradient_dtype)
        fuse_gradients(self.stage.models, fusion)
        return fusion

    def forward(self, micro_batches: Sequence[MicroBatch], ld_alpha: float | None = None) -> list[Tensor]:
        watch = None
        if self.routes is not None:
            watch = watch_of(self.stage.models[0].config, compute_device(), replays=self.routes.of(micro_batches))
        return self.schedule.forward_only(self.models, micro_batches, ld_alpha, watch)

    def forward_backward(
        self,
        micro_batches: Sequence[MicroBatch],
        response_gradient: ResponseGradient,
        ld_alpha: float | None = None,
    ) -> None:
        self.watch = watch_step(
            self.stage.models[0].config,
            compute_device(),
            self.train.router_aux_coef,
            lambda counting: self.schedule.forward_only(self.models, micro_batches, ld_alpha, counting),
            None if self.routes is None else self.routes.of(micro_batches),
        )
        self.schedule.forward_backward(self.models, micro_batches, response_gradient, ld_alpha, self.watch)

    def gradient_buffer(self, parameter: Any) -> Tensor | None:
        """Megatron's `main_grad`, in `gradient_dtype`. Its hook also adds what autograd gives (a tied embedding's part)."""
        if self.overlap and not getattr(parameter, "zero_out_wgrad", False):
            # The hook that starts the reduction expects a gradient, and a mark that it has been added already. Where an
            # embedding on this stage is tied to the head (`zero_out_wgrad`), the embedding's backward gives one.
            parameter.grad = parameter.new_zeros(()).expand_as(parameter)
            parameter.grad_added_to_main_grad = True
        return parameter.main_grad

    def router_metrics(self) -> dict[str, float]:
        return balance_metrics(self.stage.correction_biases, self.watch, self.train.router_bias_update_rate)

    def finish_gradients(self) -> None:
        # num_tokens=None: the pair weights in the loss are exact already, nothing more is divided.
        finalize_model_grads(self.models, num_tokens=None)
        for parameter, place in self._frozen:
            getattr(parameter, "main_grad").view(-1)[place].zero_()  # noqa: B009

    def step(self, learning_rate: float, accepts: Callable[[float], bool] | None = None) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = self.train.weight_decay * group.get("wd_mult", 1.0)
        with cpu_tensors_pass_for_cuda():
            self.optimizer.prepare_grads()
            norm = self._gradient_norm()
        if accepts is None and not math.isfinite(norm):
            raise ArithmeticError(f"the gradient norm is {norm}")
        if accepts is None or accepts(norm):
            with cpu_tensors_pass_for_cuda():
                self._clip_gradients(norm)
                if self._muon is not None:
                    self._muon.step(learning_rate)
                self.optimizer.step_with_ready_grads()
            move_correction_biases(self.stage.correction_biases, self.watch, self.train.router_bias_update_rate)
        self._clear_gradients()
        self.optimizer.zero_grad()
        return norm

    def _gradient_norm(self) -> float:
        """Over all ranks, in a few kernels and one transfer. (Megatron's own, which rounds alike, waits for the device once
        a parameter where neither TransformerEngine nor Apex is installed.)"""
        gradients: dict[Any, list[Tensor]] = {}
        for optimizer in self.optimizers:
            gradients.setdefault(optimizer.get_grad_stats_parallel_group(), []).extend(
                optimizer.get_main_grads_for_grad_norm()
            )
        squares = []
        for group, own in gradients.items():
            squares.append(get_total_norm(own).to(compute_device(), torch.float32).square())
            with part("communication"):
                dist.all_reduce(squares[-1], group=group)
        norms = [math.sqrt(square) for square in torch.stack(squares).tolist()]
        return norms[0] if len(norms) == 1 else math.hypot(*norms)

    def _clip_gradients(self, norm: float) -> None:
        """By Megatron's formula; each gradient is read and written once."""
        coefficient = self.train.clip_norm / (norm + 1e-6)
        if self.train.clip_norm <= 0 or coefficient >= 1:
            return
        for optimizer in self.optimizers:
            gradients = [parameter.grad for parameter in optimizer.get_parameters() if parameter.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, coefficient)

    def _clear_gradients(self) -> None:
        for model in self.models:
            model.zero_grad_buffer()

    def wait_for_parameters(self) -> None:
        if self.overlap:  # else a step ends when they are there
            for model in self.models:
                model.start_param_sync(force_sync=True)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, (parameter, _) in self.stage.parameters.items():
            owned = self._owned_range(parameter)
            own = None if owned is None else getattr(parameter, "main_grad").view(-1)[owned]  # noqa: B009
            yield name, _join_over_data(parameter, owned, own)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        self.wait_for_parameters()
        for name, (parameter, _) in self.stage.held.items():
            yield name, parameter.data

    def state(self, kinds: Sequence[str] | None = None) -> Iterator[tuple[str, str, Tensor]]:
        for name, (parameter, shard) in self.stage.held.items():
            kept = ("weights", *kept_of(shard, self.train))
            asked = [kind for kind in kept if kinds is None or kind in kinds]
            if name not in self.stage.parameters:
                yield from (("weights", name, parameter.data.float().clone()) for _ in asked)
                continue
            owned = self._owned_range(parameter)
            tensors = {} if owned is None else self._main_state(parameter, shard)
            for kind in asked:
                yield kind, name, _join_over_data(parameter, owned, tensors.get(kind))

    def own_state(self) -> Iterator[tuple[str, ParameterShard, int, Tensor]]:
        for parameter, shard in self.stage.parameters.values():
            owned = self._owned_range(parameter)
            if owned is not None:
                for kind, values in self._main_state(parameter, shard).items():
                    yield kind, shard, owned.start, values

    def own_gradients(self) -> Iterator[tuple[str, ParameterShard, int, Tensor]]:
        for parameter, shard in self.stage.parameters.values():
            owned = self._owned_range(parameter)
            if owned is not None:
                yield "gradient", shard, owned.start, getattr(parameter, "main_grad").view(-1)[owned]  # noqa: B009

    def load_state(self, read: Callable[[str, str], Tensor], num_steps: int) -> None:
        with torch.no_grad():
            for name, (parameter, shard) in self.stage.held.items():
                weights = read("weights", name)
                parameter.data.copy_(weights)
                owned = self._owned_range(parameter)
                if owned is None:
                    continue
                main = self._main_parameter(parameter)
                main.data.copy_(weights.view(-1)[owned])
                moments = {kind: read(kind, name).view(-1)[owned] for kind in kept_of(shard, self.train)}
                set_moments(self._optimizer_of(parameter).optimizer, main, moments, num_steps)

    def describe(self) -> dict[str, Any]:
        found = [part.optimizer for part in self.optimizers]
        used: list[Any] = [] if self._muon is None else [self._muon]
        for each in found:
            used += each.rules.values() if isinstance(each, OverPieces) else [each]
        names = dict.fromkeys(f"{type(rule).__module__}.{type(rule).__name__}" for rule in used)
        return {
            "engine": "megatron",
            "optimizer": " and ".join(names) or "none on this rank",
            "gradient accumulation fusion": self.fusion,
        }

    def _owned_range(self, parameter: torch.nn.Parameter) -> slice | None:
        """The part of the flattened parameter whose optimizer state is on this data-parallel rank; None: nothing is."""
        optimizer = self._optimizer_of(parameter)
        if optimizer is None:
            return None
        owned = optimizer._get_model_param_range_map(parameter)["param"]
        return slice(owned.start, owned.end)

    def _optimizer_of(self, parameter: torch.nn.Parameter) -> Any:
        """The distributed optimizer that owns a part of the parameter on this rank; None where others own all of it."""
        return next((each for each in self.optimizers if parameter in each.model_param_group_index_map), None)

    def _main_parameter(self, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        optimizer = self._optimizer_of(parameter)
        group, order = optimizer.model_param_group_index_map[parameter]
        return optimizer.optimizer.param_groups[group]["params"][order]

    def _main_state(self, parameter: torch.nn.Parameter, shard: ParameterShard) -> dict[str, Tensor]:
        """The owned part of fp32 weights and moments; the moments are zeros before the first step."""
        main = self._main_parameter(parameter)
        optimizer = self._optimizer_of(parameter).optimizer
        return {"weights": main.detach(), **moments_of(optimizer, main, kept_of(shard, self.train))}

    def _choose_rules(self, moments: str) -> None:
        """What updates Megatron's flat fp32 parameters: AdamW of one kind or another, or what the options ask for."""
        self._frozen: list[tuple[torch.nn.Parameter, slice]] = []
        """Of parameters that are trained in part, what is not."""
        self._muon: Muon | None = None
        if is_plain(self.train):
            choose_adamw(self.optimizer, moments)
            return
        pieces: list[list[Piece]] = [[] for _ in self.optimizers]
        of_muon: list[MuonShard] = []
        for parameter, shard in self.stage.parameters.values():
            runs = runs_of(shard, self.train)
            self._frozen += [(parameter, slice(run.start, run.end)) for run in runs if run.settings.rule == "frozen"]
            owned, own = self._owned_range(parameter), []
            if owned is not None:
                own = list(pieces_of(runs, owned, self._main_parameter(parameter)))
                pieces[self.optimizers.index(self._optimizer_of(parameter))] += own
            if self.train.optimizer == "muon":
                of_muon += muon_shard(parameter, shard, self.train, 0 if owned is None else owned.start, own)
        if self.train.optimizer == "muon":
            self._muon = Muon(of_muon, self.train.momentum, self.train.weight_decay)
        others = {} if self._muon is None else {"muon": self._muon}
        for optimizer, of_it in zip(self.optimizers, pieces, strict=True):
            optimizer.optimizer = OverPieces(optimizer.optimizer, of_it, self.train, moments, others)


def _data_parallel(stage: Stage, overlap: bool, gradient_dtype: torch.dtype) -> list[DistributedDataParallel]:
    """The stage's chunks with buffers for gradients, which are reduced over replicas.

    Args:
        overlap: reduce gradients, and gather updated parameters, while other operations run.
        gradient_dtype: what they are kept and sent in; what comes from the replicas is added up in float32.
    """
    options = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=gradient_dtype is torch.float32,
        reduce_scatter_with_fp32_accumulation=gradient_dtype is torch.bfloat16,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        bucket_size=BUCKET_ELEMENTS,
    )
    models = [DistributedDataParallel(model.config, options, model) for model in stage.models]
    if overlap:
        # How the schedules say which micro-batch is the last one, in whose backward pass gradients are finished.
        no_sync = [model.no_sync for model in models]
        stage.models[0].config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    else:
        _skip_collectives_of_one_rank(models)
    return models


def _skip_collectives_of_one_rank(models: Sequence[DistributedDataParallel]) -> None:
    """No collectives where a buffer has one replica: gloo would copy the whole buffer, the weights' through new memory."""
    for group in (group for model in models for group in model.bucket_groups + model.expert_parallel_bucket_groups):
        if group.intra_distributed_optimizer_instance_size == 1:
            group.start_param_sync = lambda force_sync=False: None
            if all(bucket.gradient_scaling_factor == 1 for bucket in group.buckets):
                group.start_grad_sync = lambda force_all_reduce=False: None


def _join_over_data(parameter: torch.nn.Parameter, owned: slice | None, own: Tensor | None) -> Tensor:
    """A parameter-shaped fp32 tensor from the parts on the data-parallel ranks, bit for bit."""
    group = replicas_of(parameter)
    num_replicas = dist.get_world_size(group)
    if num_replicas == 1 and own is not None and own.numel() == parameter.numel():
        return own.detach().to(parameter.device, torch.float32, copy=True).view(parameter.shape)
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    if owned is not None and own is not None:
        whole[owned] = own
    if num_replicas > 1:
        # Each element is set on one rank only; added as integers, even the sign of a zero survives.
        dist.all_reduce(whole.view(torch.int32), group=group)
    return whole.view(parameter.shape)
