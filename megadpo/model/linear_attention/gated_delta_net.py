"""Linear attention by a gated delta net (arXiv:2412.06464), as Qwen3-Next's layers have it, over a packed stream.

Queries, keys and values go through a short causal convolution, each column by itself; then the gated delta rule, a norm of
each head's outputs, and a gate. Under tensor parallelism a rank has some key heads with the value heads that read them, so
that nothing crosses the ranks but what does so around any column- and row-parallel layer.

Megatron-core's own `GatedDeltaNet` has the same parts, but knows no packed sequences and no other kernels than fla's.

Axes: T stream tokens, t of this rank's part under sequence parallelism, G key heads of this tensor rank, R value heads that
read each of them, H = G R, K columns of a query and key head, V of a value head, F columns of queries, keys and values
together, E rows that the convolution reads.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megadpo.model.attention.core import StreamParams
from megadpo.model.linear_attention.by_inputs import keeping_inputs
from megadpo.model.linear_attention.chunks import Contexts
from megadpo.model.linear_attention.kernels import DeltaRule
from megadpo.model.recompute import recomputable, remember
from megadpo.model.shape import LinearAttention
from megadpo.model.weight_gradients import ColumnLinear, RowLinear
from megadpo.platform.device import compute_device


@dataclass
class GatedDeltaNetSubmodules:
    """The linear layers of one."""

    linear_in: Any = ColumnLinear
    linear_proj: Any = RowLinear


class GatedDeltaNet(MegatronModule):
    """Fills a layer's self_attention slot.

    `linear_in` gives for each key head one after the other: query, key, the values and gates of the heads that read it,
    and their rates and decays.

    Attributes:
        A_log, dt_bias: [H], of the decays.
    """

    def __init__(
        self,
        config: Any,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int,
        sizes: LinearAttention,
        delta_rule: DeltaRule,
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number, self.sizes, self.delta_rule = layer_number, sizes, delta_rule
        self.tp_group = pg_collection.tp
        self.num_key_heads = sizes.num_key_heads // self.tp_group.size()
        num_value_heads = sizes.num_value_heads // self.tp_group.size()
        linear: dict[str, Any] = {"config": config, "bias": False, "skip_bias_add": False, "is_expert": False}
        linear["tp_group"] = self.tp_group
        self.linear_in = submodules.linear_in(
            config.hidden_size, sizes.num_inputs, init_method=config.init_method, gather_output=False, **linear
        )
        self.linear_proj = submodules.linear_proj(
            sizes.num_value_heads * sizes.value_dim,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            **linear,
        )
        made: dict[str, Any] = {"dtype": config.params_dtype}
        made["device"] = None if config.use_cpu_initialization else compute_device()
        self.conv1d = CausalConvolution(sizes.num_convolved // self.tp_group.size(), sizes.kernel_size, **made)
        self.norm = GatedNorm(sizes.value_dim, config.layernorm_epsilon, self.tp_group, **made)
        self.A_log = torch.nn.Parameter(torch.empty(num_value_heads, **made))
        self.dt_bias = torch.nn.Parameter(torch.empty(num_value_heads, **made))

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, packed_seq_params: StreamParams | None = None, **unused: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[t, 1, hidden] and no bias, from hidden [t, 1, hidden]."""
        assert packed_seq_params is not None and packed_seq_params.micro_batch is not None
        stream, micro_batch, sizes = packed_seq_params, packed_seq_params.micro_batch, self.sizes
        assert micro_batch.shard is None  # context parallelism is refused
        segments, num_tokens = micro_batch.segments, len(micro_batch.tokens_T)
        inputs, _ = self.linear_in(hidden_states)
        by_head = inputs.view(num_tokens, self.num_key_heads, -1)
        K, V, R = sizes.key_dim, sizes.value_dim, sizes.num_value_heads // sizes.num_key_heads
        query, key, value, gate, rate, decay = by_head.split([K, K, R * V, R * V, R, R], dim=-1)
        mixed_TF = torch.cat([x.flatten(1) for x in (query, key, value)], dim=1)
        device = mixed_TF.device
        contexts = stream.once("contexts", lambda: Contexts.of(segments, num_tokens, device, context=sizes.kernel_size - 1))
        convolved_TF = recomputable(F.silu, self.conv1d(mixed_TF, contexts))
        query, key, value = convolved_TF.split([x.shape[1] * x.shape[2] for x in (query, key, value)], dim=1)
        # In float32, where a decay near 1 would else be 1.
        log_decay_TH = -self.A_log.float().exp() * F.softplus(decay.flatten(1).float() + self.dt_bias)
        prepared = stream.once("delta rule", lambda: self.delta_rule.prepare(segments, num_tokens, device))
        output_THV = self.delta_rule.outputs(
            query.unflatten(1, (-1, K)),
            key.unflatten(1, (-1, K)),
            value.unflatten(1, (-1, V)),
            log_decay_TH,
            rate.flatten(1).sigmoid(),
            prepared,
        )
        normed = self.norm(output_THV, gate.reshape(output_THV.shape))
        result: tuple[Tensor, Tensor | None] = self.linear_proj(normed.flatten(1).unsqueeze(1))
        return result


class CausalConvolution(torch.nn.Module):
    """[T, F], from x [T, F]: each column by itself, of a token and those before it in its sequence.

    Attributes:
        weight: [F, 1, kernel size], a token's own factor last.
    """

    def __init__(self, num_columns: int, kernel_size: int, **made: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(num_columns, 1, kernel_size, **made))

    def forward(self, x_TF: Tensor, contexts: Contexts) -> Tensor:
        rows_EF = torch.cat([x_TF, x_TF.new_zeros(1, x_TF.shape[1])]).index_select(0, contexts.rows_E)
        convolved_FE = F.conv1d(rows_EF.t(), self.weight, groups=len(self.weight))
        return convolved_FE.t().index_select(0, contexts.place_T)


class GatedNorm(torch.nn.Module):
    """x / rms(x) * weight * silu(gate), from x and gate [T, H, V]; rounded where transformers does: before the weight and
    at last.

    Each tensor rank has its heads' part of the gradient of the weight [V], which all have whole: it is summed.
    """

    def __init__(self, num_columns: int, epsilon: float, group: dist.ProcessGroup, **made: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(num_columns, **made))
        self.epsilon, self.group = epsilon, group

    def forward(self, x_THV: Tensor, gate_THV: Tensor) -> Tensor:
        weight_V = copy_to_tensor_model_parallel_region(self.weight, group=self.group)
        operation = functools.partial(_gated_norm, epsilon=self.epsilon)
        result = keeping_inputs(operation, x_THV, gate_THV, weight_V)
        remember(result, operation, x_THV, gate_THV, weight_V)
        return result


def _gated_norm(x_THV: Tensor, gate_THV: Tensor, weight_V: Tensor, epsilon: float) -> Tensor:
    wide = x_THV.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (weight_V * normed.to(x_THV.dtype) * F.silu(gate_THV.float())).to(x_THV.dtype)
