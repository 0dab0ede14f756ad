"""Mixture-of-experts layers: Megatron's, with a router that chooses as transformers does (routing.py) and knows the stream.

No token is dropped and no noise is added.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megadpo.model.attention.core import StreamParams
from megadpo.model.families.shards import EXPERT_BIAS
from megadpo.model.moe.biased import BiasedExperts, ClampedSwiGLU, ExpertRowLinear
from megadpo.model.moe.products import Experts as GroupedExperts
from megadpo.model.moe.routing import Routed, route
from megadpo.model.router_load import RouterWatch
from megadpo.model.shape import Experts, Routing
from megadpo.model.swiglu import SwiGLU
from megadpo.model.weight_gradients import use_own_linear_layers
from megadpo.platform.device import compute_device


@dataclass(frozen=True)
class CorrectionBias:
    """A router's correction bias, float32 [E].

    Its values are no parameter of the router's, and no buffer: DeepSpeed casts these to the model's type, and in stage 3
    refuses other types.
    """

    values: torch.nn.Parameter


class Router(TopKRouter):
    """hidden [T, 1, H] -> (probabilities [T, E], zero where not chosen; chosen, boolean [T, E])."""

    def __init__(self, *, config: Any, pg_collection: Any, routing: Routing, has_bias: bool = False) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        if not self.weight.is_meta:
            self.weight.data = self.weight.data.to(compute_device())  # Megatron makes it on the CPU
        if has_bias:
            self.bias = torch.nn.Parameter(self.weight.data.new_empty(len(self.weight)))
            setattr(self.bias, "sequence_parallel", config.sequence_parallel)  # noqa: B010
        self.routing = routing
        self.correction_bias: CorrectionBias | None = None
        if routing.has_correction_bias:
            values = torch.zeros(len(self.weight), dtype=torch.float32, device=compute_device())
            self.correction_bias = CorrectionBias(torch.nn.Parameter(values, requires_grad=False))
        self.stream: StreamParams | None = None

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.routing.logits_in_float32:
            input, weight, bias = input.float(), weight.float(), None if bias is None else bias.float()
        logits_TE = F.linear(input, weight, bias).flatten(0, 1)
        correction_bias_E = None if self.correction_bias is None else self.correction_bias.values
        watch, replayed_TK = None if self.stream is None else self.stream.watch, None
        if self.stream is not None and watch is not None and watch.replays is not None:
            replayed_TK = watch.replays.chosen_TK(self.stream.number, self.layer_number - 1)
        routed = route(logits_TE, self.routing, self.topk, correction_bias_E, replayed_TK)
        if self.stream is None or watch is None:
            return routed.probabilities_TE, routed.chosen_TE
        return self._watched(self.stream, watch, routed), routed.chosen_TE

    def _watched(self, stream: StreamParams, watch: RouterWatch, routed: Routed) -> Tensor:
        """Note the load, and tie the load-balancing loss to the probabilities where the pass wants its gradient."""
        layer = self.layer_number - 1
        if watch.records is not None:
            watch.records.note(stream.number, layer, routed.expert_TK)
        weight_T = stream.token_weights()
        if self.config.sequence_parallel:
            weight_T = weight_T.chunk(self.config.tensor_model_parallel_size)[self.tp_group.rank()]
        probability_E = weight_T @ routed.shares_TE
        choices_E, agreed_E = (weight_T.double() @ each_TE.double() for each_TE in (routed.chosen_TE, routed.agreed_TE))
        sums = torch.stack([choices_E, probability_E.detach().double(), agreed_E])
        watch.seen[stream.number, layer] = sums
        if watch.whole is None or not torch.is_grad_enabled():
            return routed.probabilities_TE
        loss = watch.coefficient * (probability_E * watch.whole.slope_E(layer).float()).sum()
        return _AlsoLoss.apply(routed.probabilities_TE, loss)


class _AlsoLoss(torch.autograd.Function):
    """Returns `values` unchanged; in the backward pass `loss` gets the gradient 1, as a term of the step's loss does."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, loss: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones(())


class SharedExpert(SharedExpertMLP):
    """Megatron's, whose gate is made where the other parameters are."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.gate_weight is not None and not self.gate_weight.is_meta:
            self.gate_weight.data = self.gate_weight.data.to(compute_device())


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
    mixture.submodules.experts.params = {"products": products, "scales_inputs": experts.routing.scales_inputs}
    if experts.has_biases:
        assert not experts.routing.scales_inputs
        mixture.submodules.experts.module, mixture.submodules.experts.params = BiasedExperts, {}
        expert.linear_fc2 = ExpertRowLinear
    mixture.submodules.router = functools.partial(Router, routing=experts.routing, has_bias=experts.has_biases)
    shared = MLPSubmodules(activation_func=activation)
    use_own_linear_layers(shared)
    mixture.submodules.shared_experts = ModuleSpec(module=SharedExpert, submodules=shared)
    dense.module, dense.submodules.mlp = ExpertLayer, mixture
    return dense


def with_correction_biases(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The named parameters of a chunk, and behind each router's weight its correction bias."""
    routers = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, Router)}
    for name, parameter in model.named_parameters():
        yield name, parameter
        bias = routers[name].correction_bias if name in routers else None
        if bias is not None:
            yield bias_beside(name), bias.values


def bias_beside(router_weight: str) -> str:
    """The Megatron name of the correction bias of the router whose weight has this name."""
    return router_weight.removesuffix("weight") + EXPERT_BIAS


def is_expert(name: str) -> bool:
    """Whether a Megatron parameter belongs to one expert: such parameters have replicas and groups of their own."""
    return ".experts.local_experts." in name


def moved(name: str, by: int) -> str:
    """The name that the same parameter has in the expert whose number is larger by `by`."""
    before, after = name.split(".local_experts.")
    number, rest = after.split(".", 1)
    return f"{before}.local_experts.{int(number) + by}.{rest}"
