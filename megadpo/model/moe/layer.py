"""Mixture-of-experts layers: Megatron's, with a router that chooses as transformers does and knows the stream.

Every token's probabilities are a softmax over all experts in float32 of logits in the model's type; the largest few are
taken, renormalised where the model says so. No token is dropped and no noise is added.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megadpo.model.attention.core import StreamParams
from megadpo.model.moe.biased import BiasedExperts, ClampedSwiGLU, ExpertRowLinear
from megadpo.model.moe.products import Experts as GroupedExperts
from megadpo.model.router_load import RouterWatch
from megadpo.model.shape import Experts
from megadpo.model.swiglu import SwiGLU
from megadpo.model.weight_gradients import use_own_linear_layers
from megadpo.platform.device import compute_device


class Router(TopKRouter):
    """hidden [T, 1, H] -> (probabilities [T, E], zero where not chosen; chosen, boolean [T, E])."""

    def __init__(self, *, config: Any, pg_collection: Any, renormalised: bool, has_bias: bool = False) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.weight.data = self.weight.data.to(compute_device())  # Megatron makes it on the CPU
        if has_bias:
            self.bias = torch.nn.Parameter(self.weight.data.new_empty(len(self.weight)))
            setattr(self.bias, "sequence_parallel", config.sequence_parallel)  # noqa: B010
        self.renormalised = renormalised
        self.stream: StreamParams | None = None

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits_TE = F.linear(input, self.weight, self.bias).flatten(0, 1)
        scores_TE = logits_TE.softmax(dim=-1, dtype=torch.float32)
        top_TK, expert_TK = scores_TE.topk(self.topk, dim=-1)
        if self.renormalised:
            top_TK = top_TK / top_TK.sum(dim=-1, keepdim=True)
        probabilities_TE = torch.zeros_like(scores_TE).scatter(1, expert_TK, top_TK)
        chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, expert_TK, True)
        if self.stream is not None and self.stream.watch is not None:
            probabilities_TE = self._watched(self.stream, self.stream.watch, scores_TE, chosen_TE, probabilities_TE)
        return probabilities_TE, chosen_TE

    def _watched(
        self, stream: StreamParams, watch: RouterWatch, scores_TE: Tensor, chosen_TE: Tensor, probabilities_TE: Tensor
    ) -> Tensor:
        """Note the load, and tie the load-balancing loss to the probabilities where the pass wants its gradient."""
        layer = self.layer_number - 1
        weight_T = stream.token_weights()
        if self.config.sequence_parallel:
            weight_T = weight_T.chunk(self.config.tensor_model_parallel_size)[self.tp_group.rank()]
        probability_E = weight_T @ scores_TE
        sums = torch.stack([weight_T.double() @ chosen_TE.double(), probability_E.detach().double()])
        watch.seen[stream.number, layer] = sums
        if watch.whole is None or not torch.is_grad_enabled():
            return probabilities_TE
        loss = watch.coefficient * (probability_E * watch.whole.slope_E(layer).float()).sum()
        return _AlsoLoss.apply(probabilities_TE, loss)


class _AlsoLoss(torch.autograd.Function):
    """Returns `values` unchanged; in the backward pass `loss` gets the gradient 1, as a term of the step's loss does."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, loss: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones(())


class ExpertLayer(TransformerLayer):
    """A layer that gives its router the stream's parameters, also when it is recomputed in the backward pass."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.mlp.router.stream = kwargs["packed_seq_params"]
        return super().forward(*args, **kwargs)


def expert_layer_spec(dense: ModuleSpec, experts: Experts, activation: type[SwiGLU], products: str) -> ModuleSpec:
    """The layer `dense` with experts in place of its MLP, with `activation` between their two products, which are computed
    as `products` says (`products.WAYS`)."""
    mixture = get_moe_module_spec(use_te=False, num_experts=experts.count, moe_grouped_gemm=False)
    expert = mixture.submodules.experts.submodules
    expert.activation_func = activation
    if experts.clamp is not None:
        clamp = {"alpha": experts.clamp.alpha, "limit": experts.clamp.limit}
        expert.activation_func = ModuleSpec(module=ClampedSwiGLU, params=clamp)
    use_own_linear_layers(expert, mlp_bias=experts.has_biases)
    mixture.submodules.experts.module = GroupedExperts
    mixture.submodules.experts.params = {"products": products}
    if experts.has_biases:
        mixture.submodules.experts.module, mixture.submodules.experts.params = BiasedExperts, {}
        expert.linear_fc2 = ExpertRowLinear
    mixture.submodules.router = functools.partial(Router, renormalised=experts.renormalised, has_bias=experts.has_biases)
    dense.module, dense.submodules.mlp = ExpertLayer, mixture
    return dense


def is_expert(name: str) -> bool:
    """Whether a Megatron parameter belongs to one expert: such parameters have replicas and groups of their own."""
    return ".experts.local_experts." in name


def moved(name: str, by: int) -> str:
    """The name that the same parameter has in the expert whose number is larger by `by`."""
    before, after = name.split(".local_experts.")
    number, rest = after.split(".", 1)
    return f"{before}.local_experts.{int(number) + by}.{rest}"
