"""Weight gradients of Megatron's parallel linear layers, added by one product to where the engine keeps them.

Megatron leaves such a gradient to autograd, as a tensor of its own, which a hook adds to `main_grad`. With its
`gradient_accumulation_fusion` the product itself adds to `main_grad`, by Apex's extension; where that is missing, torch's
products do it here. Norms, biases, embeddings and routers stay with autograd; the log-prob head has its own way
(`Engine.gradient_buffer`).

Such a product is read by nobody before the end of the step, so it can also be put off (`schedule.zero_bubble`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers as tensor_parallel_layers
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    LinearWithGradAccumulationAndAsyncCommunication,
    RowParallelLinear,
)
from torch import Tensor

from megadpo.model.heads.logprob import add_product, adds_in_one_call


def choose_fusion(requested: bool | None, device: torch.device, dtype: torch.dtype, layers: str = "local") -> str:
    """Whose products add to `main_grad`: "transformer_engine", "apex", "torch" or "off".

    Args:
        requested: as `parallel.gradient_accumulation_fusion`; None: on CUDA where one call does it.
        layers: what these are, as `model.layers`; TransformerEngine's have products of their own.
    """
    if requested is False or (requested is None and device.type != "cuda"):
        return "off"
    if layers == "transformer_engine":
        return layers
    if device.type == "cuda" and tensor_parallel_layers._grad_accum_fusion_available:
        return "apex"
    return "torch" if requested or adds_in_one_call(device, dtype) else "off"


def fuse_gradients(models: Iterable[Any], way: str) -> None:
    """Have the linear layers of `models` add their weights' gradients up by `way`, as `choose_fusion` gave it.

    Call when every parameter has its `main_grad`.
    """
    if way == "off":
        return
    if way == "torch":
        tensor_parallel_layers.fused_weight_gradient_mlp_cuda = _TorchProducts
    tensor_parallel_layers.LinearWithGradAccumulationAndAsyncCommunication = _IntoMainGrad
    for model in models:
        for module in model.modules():
            if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                module.gradient_accumulation_fusion = True
            elif hasattr(module, "fuse_wgrad_accumulation"):  # TransformerEngine's
                module.fuse_wgrad_accumulation = True


class Products:
    """Products of weight gradients that a backward has left for later; each keeps its operands."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()

    def append(self, product: Callable[[], None]) -> None:
        self._waiting.append(product)

    @torch.no_grad()
    def add_up(self) -> None:
        """Do them, in the order of the backward."""
        while self._waiting:
            self._waiting.popleft()()


_open: Products | None = None


@contextmanager
def delay_products() -> Iterator[Products]:
    """Within it, backwards of linear layers under `fuse_gradients` leave their products of weight gradients in what this
    gives."""
    global _open
    _open = Products()
    try:
        yield _open
    finally:
        _open = None


class _TorchProducts:
    """What Megatron calls of Apex's `fused_weight_gradient_mlp_cuda`."""

    @staticmethod
    def wgrad_gemm_accum_fp32(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        """main_grad [O, I], float32, += grad_output [T, O].t() @ total_input [T, I]."""
        add_product(main_grad, grad_output.t(), total_input)


class _IntoMainGrad(LinearWithGradAccumulationAndAsyncCommunication):
    """Megatron's linear layer, whose weight is marked also where it is not what autograd saved of it; and whose weight
    gradient can be put off.

    Megatron marks the saved tensor, which under hooks (offloaded activations) is another one, and there hands no gradient to
    the hook that starts the reduction. As otherwise, that gets a stand-in, which nobody reads: so that on CUDA it runs on
    the thread of all others, and reductions start in the same order on every rank.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        ctx.weight = weight
        return LinearWithGradAccumulationAndAsyncCommunication.forward(ctx, input, weight, *rest)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.gradient_accumulation_fusion:
            return LinearWithGradAccumulationAndAsyncCommunication.backward(ctx, *gradients)
        if _open is not None:
            results = _without_weights(ctx, gradients[0], _open)
        else:
            results = LinearWithGradAccumulationAndAsyncCommunication.backward(ctx, *gradients)
        if results[1] is not None:
            return results
        ctx.weight.grad_added_to_main_grad = True
        return results[0], torch.empty_like(ctx.weight), *results[2:]


def _without_weights(ctx: Any, gradient: Tensor, products: Products) -> tuple[Tensor | None, ...]:
    """Megatron's backward of a linear layer, whose product for the weight goes to `products`."""
    input, weight = ctx.saved_tensors
    group, main_grad = ctx.tp_group, ctx.weight.main_grad
    below = gradient.matmul(weight)
    if ctx.allreduce_dgrad:
        dist.all_reduce(below, group=group)
    if ctx.sequence_parallel:
        whole, below = below, torch.empty_like(input)
        dist.reduce_scatter_tensor(below, whole.contiguous(), group=group)

    def product() -> None:
        read = input
        if ctx.sequence_parallel:
            read = input.new_empty((input.shape[0] * dist.get_world_size(group), *input.shape[1:]))
            dist.all_gather_into_tensor(read, input.contiguous(), group=group)
        rows = gradient.reshape(-1, gradient.shape[-1])
        add = tensor_parallel_layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32
        add(read.reshape(-1, read.shape[-1]), rows, main_grad)

    products.append(product)
    bias = gradient.flatten(0, -2).sum(dim=0) if ctx.use_bias else None
    return below, None, bias, *(None,) * 6
