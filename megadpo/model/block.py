"""What some models' layers have and Megatron's have no slot for: norms of what attention and MLP give, a factor on it, and
one norm that both read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megadpo.model.shape import ModelShape

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

AFTER_ATTENTION, AFTER_MLP = "post_self_attn_layernorm", "post_mlp_layernorm"
"""Where a layer has these norms, in Megatron's way of naming."""


def add_norms_after(model: GPTModel, shape: ModelShape, norm: Callable[..., torch.nn.Module]) -> None:
    """Give a chunk's layers the norms of what attention and MLP give, where the model has them."""
    for layer in model.decoder.layers:
        for place, name in ((AFTER_ATTENTION, shape.norms.after_attention), (AFTER_MLP, shape.norms.after_mlp)):
            if name is not None:
                made = norm(config=model.config, hidden_size=shape.hidden_size, eps=shape.norm_epsilon)
                setattr(layer, place, made)


def complete_layers(model: GPTModel, shape: ModelShape) -> None:
    """Have a chunk's layers compute with these norms and the residual multiplier, and parallel ones with one norm.

    After `residual.join_adds_and_norms`: the adds are the ones that there are by then.
    """
    for layer in model.decoder.layers:
        if shape.is_parallel:
            layer.pre_mlp_layernorm = AttentionsInput(layer.input_layernorm)
        for add, place in (("self_attn_bda", AFTER_ATTENTION), ("mlp_bda", AFTER_MLP)):
            norm = getattr(layer, place, None)
            if norm is not None or shape.residual_multiplier != 1.0:
                setattr(layer, add, _Finished(getattr(layer, add), norm, shape.residual_multiplier))


class _Finished:
    """Fills a layer's slot for bias, dropout and add: what is added is normed and scaled first."""

    def __init__(self, add: Callable[..., Any], norm: torch.nn.Module | None, multiplier: float) -> None:
        self.add, self.norm, self.multiplier = add, norm, multiplier

    def __call__(self, is_training: bool, is_fused: bool) -> Callable[..., Tensor]:
        def add(output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            output, bias = output_and_bias
            assert bias is None  # ours are added by the layers that have them
            if self.norm is not None:
                output = self.norm(output)
            if self.multiplier != 1.0:
                output = output * self.multiplier
            added: Tensor = self.add(is_training, is_fused)((output, None), residual, dropout)
            return added

        return add


class AttentionsInput(torch.nn.Module):
    """Fills the slot of the norm before the MLP: gives it what the norm before attention gave in this pass."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self._given: Tensor | None = None
        norm.register_forward_hook(self._keep)

    def _keep(self, norm: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if len(inputs) == 1:  # else it adds first, and is called again for the norm
            self._given = output

    def forward(self, hidden: Tensor) -> Tensor:
        given, self._given = self._given, None
        assert given is not None
        return given
