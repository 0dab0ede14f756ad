"""What GPT-OSS's experts have that others do not: a clamped SwiGLU, and biases.

Axes: T tokens, H hidden size, F inner size of an expert on this rank, E experts of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from megadpo.model.recompute import recomputable
from megadpo.model.swiglu import SwiGLU
from megadpo.model.weight_gradients import RowLinear


class ClampedSwiGLU(SwiGLU):
    """[..., 2 F], gate first -> [..., F]: (up + 1) * gate * sigmoid(alpha * gate), where the gate is at most `limit`, and up
    between it and its negative."""

    def __init__(self, config: Any = None, *, alpha: float, limit: float) -> None:
        super().__init__(config)
        self.alpha, self.limit = alpha, limit

    def forward(self, x: Tensor) -> Tensor:
        return recomputable(self._of, x)

    def _of(self, x: Tensor) -> Tensor:
        return _ClampedSwiGLU.apply(x, self.alpha, self.limit)


class _ClampedSwiGLU(torch.autograd.Function):
    """Keeps its input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float, limit: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.alpha, ctx.limit = alpha, limit
        gate, up = x.chunk(2, dim=-1)
        gate = gate.clamp(max=limit)
        return (gate * alpha).sigmoid_().mul_(gate).mul_(up.clamp(-limit, limit).add_(1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,), (gradient,), limit = ctx.saved_tensors, gradients, ctx.limit
        gate, up = x.chunk(2, dim=-1)
        low, between = gate.clamp(max=limit), up.clamp(-limit, limit)
        gates = (low * ctx.alpha).sigmoid_()
        slope = gates * (1 + ctx.alpha * low * (1 - gates))
        gate_gradient = gradient * (between + 1) * slope * (gate <= limit)
        up_gradient = gradient * low * gates * (up.abs() <= limit)
        return torch.cat([gate_gradient, up_gradient], dim=-1), None, None


class BiasedExperts(SequentialMLP):
    """Megatron's experts, one after the other. (Its MLP adds a bias in place to what autograd does not allow that of.)"""

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """hidden [T, H] in the experts' order, tokens of each [E], probabilities [T] -> what the experts give [T, H]."""
        counts, outputs = tokens_per_expert.tolist(), []
        parts = (permuted_local_hidden_states.split(counts), permuted_probs[:, None].split(counts))
        for expert, tokens, probabilities in zip(self.local_experts, *parts, strict=True):
            inner = expert.activation_func(expert.linear_fc1(tokens)[0])
            output, bias = expert.linear_fc2((inner * probabilities).to(inner.dtype))
            outputs.append((output + bias * probabilities).to(output.dtype))
        return torch.cat(outputs), None


class ExpertRowLinear(RowLinear):
    """An expert's second product, with a bias, which it hands on: a token's probability multiplies that, too.

    What the ranks that share the expert's matrices give is added up. So each gives its share of the bias, whose gradient is
    the whole one on each of them.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **(options | {"bias": True, "skip_bias_add": True}))
        setattr(self.bias, "sequence_parallel", False)  # noqa: B010  # experts have groups of their own

    def forward(self, input_: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_, *arguments, **options)
        # A tensor of its own also where there is one rank: ZeRO-3 takes the parameter away after this.
        return output, None if bias is None else _Share.apply(bias, self.tp_group.size())


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor, num_ranks: int) -> Tensor:
        return bias / num_ranks

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
