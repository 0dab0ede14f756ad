"""Weight gradients of the tensor-parallel linear layers, added by one product to where the engine keeps them.

Megatron leaves such a gradient to autograd, as a tensor of its own, which a hook adds to the parameter's `main_grad`. With
its `gradient_accumulation_fusion` the product itself adds to `main_grad`, by Apex's extension. The layers here do that too,
by Apex's extension or, where it is missing, by torch's products. Norms, biases, embeddings and routers stay with autograd;
the log-prob head has its own way (`Engine.gradient_buffer`).

Nothing reads these gradients before the end of the step, so their products can also be delayed (`schedule.zero_bubble`).

Axes: T tokens, I input and O output columns on this rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import layers as tensor_parallel_layers
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    LinearWithGradAccumulationAndAsyncCommunication,
    RowParallelLinear,
)
from torch import Tensor

from megadpo.model.adapters.linear import OFF, AdapterSwitch, LinearAdapter
from megadpo.model.four_bit.weight import FourBitWeight
from megadpo.model.heads.logprob import add_product, adds_in_one_call

AddWeightGradient = Callable[[Tensor, Tensor, Tensor], None]
"""(input [T, I], gradient of the output [T, O], main_grad [O, I], which gradient.t() @ input is added to)."""


def choose_fusion(
    requested: bool | None,
    device: torch.device,
    dtype: torch.dtype,
    layers: str = "local",
    gradient_dtype: torch.dtype = torch.float32,
) -> str:
    """Whose products add to `main_grad`: "transformer_engine", "apex", "torch" or "off".

    Args:
        requested: as `parallel.gradient_accumulation_fusion`; None: on CUDA where one call does it.
        layers: what these are, as `model.layers`; TransformerEngine's have products of their own.
        gradient_dtype: of `main_grad`.
    """
    if requested is False or (requested is None and device.type != "cuda"):
        return "off"
    if layers == "transformer_engine":
        return layers
    if gradient_dtype is torch.bfloat16:
        return "torch"
    if device.type == "cuda" and tensor_parallel_layers._grad_accum_fusion_available:
        return "apex"
    return "torch" if requested or adds_in_one_call(device, dtype) else "off"


def fuse_gradients(models: Iterable[Any], way: str) -> None:
    """Have the linear layers of `models` add their weights' gradients by `way`, as `choose_fusion` gave it.

    Call when every parameter has its `main_grad`.
    """
    if way == "off":
        return
    for model in models:
        for module in model.modules():
            if isinstance(module, _AddsWeightGradient):
                module.add_weight_gradient = _add_by_apex if way == "apex" else _add_by_torch
            elif hasattr(module, "fuse_wgrad_accumulation"):  # TransformerEngine's
                module.fuse_wgrad_accumulation = True


def use_own_linear_layers(mlp: Any, attention: Any = None) -> None:
    """Put the layers of this file into the submodules of a Megatron layer's spec."""
    mlp.linear_fc1, mlp.linear_fc2 = ColumnLinear, RowLinear
    if attention is not None:
        attention.linear_qkv, attention.linear_proj = ColumnLinear, RowLinear


def _add_by_torch(input_TI: Tensor, gradient_TO: Tensor, main_grad_OI: Tensor) -> None:
    add_product(main_grad_OI, gradient_TO.t(), input_TI)


def _add_by_apex(input_TI: Tensor, gradient_TO: Tensor, main_grad_OI: Tensor) -> None:
    tensor_parallel_layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(input_TI, gradient_TO, main_grad_OI)


class Products:
    """Delayed products of weight gradients, each with its operands."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()

    def append(self, product: Callable[[], None]) -> None:
        self._waiting.append(product)

    @torch.no_grad()
    def add_up(self) -> None:
        """Compute them, in the order of the backward."""
        while self._waiting:
            self._waiting.popleft()()


_delayed: Products | None = None


@contextmanager
def delay_products() -> Iterator[Products]:
    """Within it, backwards of linear layers under `fuse_gradients` append their weight gradients' products to it."""
    global _delayed
    _delayed = Products()
    try:
        yield _delayed
    finally:
        _delayed = None


def delayed_products() -> Products | None:
    """What `delay_products` has made, within it."""
    return _delayed


class _AddsWeightGradient:
    """A linear layer whose backward adds the weight's gradient to `main_grad` where `add_weight_gradient` says how."""

    add_weight_gradient: AddWeightGradient | None = None

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        if self.add_weight_gradient is None or not weight.requires_grad:
            return super()._forward_impl(input, weight, **options)  # type: ignore[misc]
        return _LinearIntoMainGrad.apply(
            input,
            weight,
            options["bias"],
            options["allreduce_dgrad"],
            options["sequence_parallel"],
            options["tp_group"],
            self.add_weight_gradient,
        )


class _TakesAdapters:
    """A linear layer that adds what the adapters give to which its switch is turned.

    Attributes:
        adapters: by the switch's state; none in most models.
        four_bit: the weight, in layers of four_bit/linear.py, which have no parameter for it.
    """

    adapters: Mapping[str, LinearAdapter] = MappingProxyType({})
    adapter_switch: AdapterSwitch | None = None
    four_bit: FourBitWeight | None = None

    def use_adapter(self, state: str, adapter: LinearAdapter, switch: AdapterSwitch) -> None:
        """Compute with `adapter` where the switch is turned to `state`."""
        self.adapters, self.adapter_switch = {**self.adapters, state: adapter}, switch

    @property
    def _state(self) -> str:
        return OFF if self.adapter_switch is None else self.adapter_switch.state

    def has_own_product(self) -> bool:
        """Whether the layer computes with an adapter now, or has its weight in 4 bits."""
        return self._state in self.adapters or self.four_bit is not None

    def forward(self, input_: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        if self._state in self.adapters:
            return self.adapters[self._state].output(self, input_)
        return self.base_output(input_, *arguments, **options)

    def base_output(self, input_: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """What the layer gives without any adapter."""
        return super().forward(input_, *arguments, **options)  # type: ignore[misc]

    def dense_weight(self) -> Tensor:
        """The weight [O, I] as a tensor."""
        weight: Tensor = self.weight  # type: ignore[attr-defined]
        return weight


class ColumnLinear(_TakesAdapters, _AddsWeightGradient, ColumnParallelLinear):
    """Megatron's linear layer whose output columns are split over the tensor ranks."""


class RowLinear(_TakesAdapters, _AddsWeightGradient, RowParallelLinear):
    """Megatron's linear layer whose input columns are split over the tensor ranks."""


class _LinearIntoMainGrad(torch.autograd.Function):
    """Megatron's `LinearWithGradAccumulationAndAsyncCommunication`, with any product for the weight, now or delayed.

    `ctx.weight` is the parameter also under hooks on saved tensors (offloaded activations), where Megatron would mark the
    tensor that autograd gives back. The hook that starts the reduction of a parameter's gradient wants to see a gradient:
    it gets a stand-in, which nobody reads, so that on CUDA it runs on the thread of all others, and reductions start in the
    same order on every rank.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        group: dist.ProcessGroup | None,
        add_weight_gradient: AddWeightGradient,
    ) -> Tensor:
        ctx.weight, ctx.add_weight_gradient = weight, add_weight_gradient
        return LinearWithGradAccumulationAndAsyncCommunication.forward(
            ctx, input, weight, bias, True, allreduce_dgrad, sequence_parallel, None, None, group
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # As in Megatron's, collectives run during the products after them, for which CUDA_DEVICE_MAX_CONNECTIONS is 1.
        (gradient,), (input, weight) = gradients, ctx.saved_tensors
        delayed, main_grad, group, add = _delayed, ctx.weight.main_grad, ctx.tp_group, ctx.add_weight_gradient
        collective, whole_input = None, input
        if ctx.sequence_parallel and delayed is None:
            whole_input = _gather_buffer(input, group)
            collective = dist.all_gather_into_tensor(whole_input, input, group=group, async_op=True)
        input_gradient = gradient.matmul(weight)
        if collective is not None:
            collective.wait()
            collective = None
        if ctx.allreduce_dgrad:
            collective = dist.all_reduce(input_gradient, group=group, async_op=True)
        if ctx.sequence_parallel:
            whole_gradient, input_gradient = input_gradient, torch.empty_like(input)
            collective = dist.reduce_scatter_tensor(input_gradient, whole_gradient, group=group, async_op=True)
        if delayed is None:
            add(_rows(whole_input), _rows(gradient), main_grad)
        else:
            sequence_group = group if ctx.sequence_parallel else None
            delayed.append(lambda: _add_later(add, input, gradient, main_grad, sequence_group))
        bias_gradient = _rows(gradient).sum(dim=0) if ctx.use_bias else None
        if collective is not None:
            collective.wait()
        ctx.weight.grad_added_to_main_grad = True
        return input_gradient, torch.empty_like(ctx.weight), bias_gradient, None, None, None, None


def _rows(tensor: Tensor) -> Tensor:
    """[..., columns] -> contiguous [rows, columns]."""
    return tensor.contiguous().flatten(0, -2)


def _gather_buffer(input: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Megatron's shared buffer for the inputs of all tensor ranks."""
    shape = [input.shape[0] * dist.get_world_size(group), *input.shape[1:]]
    return parallel_state.get_global_memory_buffer().get_tensor(shape, input.dtype, "mpu")


def _add_later(
    add: AddWeightGradient, input: Tensor, gradient: Tensor, main_grad: Tensor, sequence_group: dist.ProcessGroup | None
) -> None:
    """A delayed product; under sequence parallelism, of the inputs of the group's ranks."""
    if sequence_group is not None:
        own = input
        input = own.new_empty((own.shape[0] * dist.get_world_size(sequence_group), *own.shape[1:]))
        dist.all_gather_into_tensor(input, own.contiguous(), group=sequence_group)
    add(_rows(input), _rows(gradient), main_grad)
