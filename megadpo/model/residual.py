"""The residual adds of a stage's layers, each computed together with the norm that reads the sum.

Megatron's layer adds in a slot of its own (`self_attn_bda`, `mlp_bda`), and hands the sum to the norm that follows: the one
before the MLP, the next layer's first, or the last of the stage. Here the slot calls that norm with both terms
(`JoiningNorm`), and the norm, when Megatron calls it with the very sum, has its result already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megadpo.model.norm import RMSNorm
from megadpo.parallel.zero3 import is_partitioned

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


class JoiningNorm(RMSNorm):
    """A norm that can take the add before it along; its results are those of the two by themselves.

    Attributes:
        num_joined: how often it did.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_joined = 0
        self._ahead: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x's norm; with `residual` the sum of both, whose norm is what the next call returns if it is for that sum."""
        if residual is not None:
            self._ahead = self.added(x, residual)
            return self._ahead[0]
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] is x:
            self.num_joined += 1
            return ahead[1]
        return super().forward(x)

    def added(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(residual + x, its norm), [..., H]."""
        raise NotImplementedError


def join_adds_and_norms(model: GPTModel) -> None:
    """Let the adds of a chunk's layers be computed by the norms after them, where these are norms that can.

    Not for layers that are computed again as a whole: what one of them leaves for the next would be of another pass.
    """
    layers = list(model.decoder.layers)
    following = [layer.input_layernorm for layer in layers[1:]] + [model.decoder.final_layernorm]
    for layer, next_norm in zip(layers, following, strict=True):
        if isinstance(layer.pre_mlp_layernorm, JoiningNorm):
            layer.self_attn_bda = _AddBefore(layer.pre_mlp_layernorm, layer.self_attn_bda)
        if isinstance(next_norm, JoiningNorm):
            layer.mlp_bda = _AddBefore(next_norm, layer.mlp_bda)


class _AddBefore:
    """Fills a layer's slot for bias, dropout and add. It calls the norm as a module, whose hooks see to its weight."""

    def __init__(self, norm: JoiningNorm, plain: Callable[..., Any]) -> None:
        self.norm, self.plain = norm, plain

    def __call__(self, is_training: bool, is_fused: bool) -> Callable[..., Tensor]:
        def add(output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            output, bias = output_and_bias
            # ZeRO-3 takes a norm's weight away again after each of its calls, in an order that it has learned.
            if bias is not None or dropout or output.dtype != residual.dtype or is_partitioned(self.norm.weight):
                return self.plain(is_training, is_fused)(output_and_bias, residual, dropout)
            return self.norm(output, residual)

        return add
