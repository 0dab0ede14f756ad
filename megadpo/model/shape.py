"""What a model is: its sizes and the facts that decide how it is built, cut over ranks and named in files.

Read once from a Hugging Face config by `families.shape_of`; no other code works out a size from that config.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

Head = Literal["logprobs", "reward"]
"""The vocabulary's head, for log-probs, or a scalar one, for rewards."""


@dataclass(frozen=True)
class Clamp:
    """Of an expert's gated MLP: (up + 1) * gate * sigmoid(alpha * gate), where the gate is at most `limit`, and up between it
    and its negative."""

    alpha: float
    limit: float


@dataclass(frozen=True)
class Experts:
    """A model's mixtures of experts.

    Attributes:
        count: experts of a layer.
        per_token: how many of them a token goes to.
        columns: inner size of an expert's gated MLP.
        renormalised: whether the chosen experts' probabilities are scaled to add up to 1.
        layers: global numbers of the layers that have experts; the others have a dense MLP.
        block: the mixture's place in a layer's Hugging Face names.
        gate, up, down: an expert's matrices there.
        router: the router there.
        has_biases: whether the router and the experts' matrices have biases.
        clamp: in place of the model's activation; None: the experts have that.
        is_fused: whether model files have all experts of a layer as one tensor (checkpoint/fused_experts.py).
    """

    count: int
    per_token: int
    columns: int
    renormalised: bool
    layers: tuple[int, ...]
    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    router: str = "gate"
    has_biases: bool = False
    clamp: Clamp | None = None
    is_fused: bool = False


@dataclass(frozen=True)
class ModelShape:
    """Sizes and facts of a model.

    Attributes:
        num_key_value_heads: heads of keys and values, each read by num_heads / num_key_value_heads query heads.
        ffn_size: inner size of a dense layer's gated MLP.
        vocab_size: rows of the embedding, without those that pad it for tensor parallelism.
        max_positions: the config's max_position_embeddings.
        norm_epsilon: of every RMSNorm.
        qkv_bias: whether the projections to queries, keys and values have biases.
        qk_norm: whether each head's query and key has an RMSNorm.
        tied_embeddings: whether the vocabulary's head is the embedding.
        windows: for each layer, how many tokens a token attends to, itself included; None: all before it. A query at
            position i sees keys at positions j with i - window < j <= i, as in transformers 5.23.
        rope_scaling: the factor on cosine and sine.
        inverse_frequencies: [head_dim / 2], float32 on the CPU.
        experts: None of a dense model.
        head: which head the model has.
        padding_token: the config's pad_token_id, which a reward model reads.
        attention_softcap: attention's scores become softcap * tanh(score / softcap) before their softmax; None: they stay.
        attention_sinks: whether each query head has a learned number in its softmax's denominator.
    """

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_epsilon: float
    qkv_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    windows: tuple[int | None, ...]
    rope_scaling: float
    inverse_frequencies: Tensor = field(compare=False, repr=False)
    experts: Experts | None
    head: Head
    padding_token: int | None
    attention_softcap: float | None = None
    attention_sinks: bool = False

    @property
    def has_windows(self) -> bool:
        """Whether any layer's attention has a sliding window."""
        return any(window is not None for window in self.windows)

    def megatron_options(self) -> dict[str, Any]:
        """Fields of Megatron's TransformerConfig: a pre-norm decoder with RMSNorm and a SiLU-gated MLP.

        Of experts, no token is dropped, and Megatron's own load balancing is off: moe/layer.py routes.
        """
        options = {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_size,
            "num_attention_heads": self.num_heads,
            "num_query_groups": self.num_key_value_heads,
            "kv_channels": self.head_dim,
            "normalization": "RMSNorm",
            "layernorm_epsilon": self.norm_epsilon,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "add_bias_linear": False,
            "add_qkv_bias": self.qkv_bias,
            "qk_layernorm": self.qk_norm,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        }
        if self.experts is None:
            return options
        return options | {
            "num_moe_experts": self.experts.count,
            "moe_ffn_hidden_size": self.experts.columns,
            "moe_router_topk": self.experts.per_token,
            "moe_router_pre_softmax": True,
            "moe_router_load_balancing_type": "none",
            "moe_layer_freq": [int(layer in self.experts.layers) for layer in range(self.num_layers)],
        }


def head_work(shape: ModelShape) -> float:
    """What a row of the head costs in tokens' worth of the layers: vocabulary x hidden over a token's parameters there."""
    hidden, experts = shape.hidden_size, shape.experts
    attention = hidden * shape.head_dim * (2 * shape.num_heads + 2 * shape.num_key_value_heads)
    num_expert_layers = 0 if experts is None else len(experts.layers)
    columns = (shape.num_layers - num_expert_layers) * shape.ffn_size
    columns += 0 if experts is None else num_expert_layers * experts.per_token * experts.columns
    return hidden * shape.vocab_size / (shape.num_layers * attention + 3 * hidden * columns)
