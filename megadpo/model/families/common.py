"""The words that families, model builder and checkpoints share: pieces of logical tensors, and where they come from.

A *logical name* is the Hugging Face parameter name (``model.layers.3.self_attn.q_proj.weight``) with its Hugging Face
shape. Every Megatron parameter shard is a list of contiguous copies, along one dimension, out of logical tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, dtype

from megadpo.errors import UserError

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
SCORE = "score.weight"


@dataclass(frozen=True)
class Piece:
    """``shard[local_start : local_start + length] = logical[logical_start : logical_start + length]`` along `dim`.

    The other dimensions are copied whole.
    """

    logical_name: str
    dim: int
    logical_start: int
    local_start: int
    length: int


@dataclass(frozen=True)
class ParameterShard:
    """One rank's part of one Megatron parameter.

    Attributes:
        name: Megatron name with the global layer number, e.g. ``decoder.layers.3.self_attention.linear_qkv.weight``.
        shape: of the local tensor.
        partition_dim: the dimension that is cut over the tensor ranks; None where every rank has the whole.
        pieces: where the values lie in the logical tensors; what no piece covers (padded vocabulary rows) is zero.
        is_primary: False where another rank holds the same values and saves them: replicated parameters on tensor
            ranks above 0, and the head of a tied model on a stage without the embedding.
    """

    name: str
    shape: tuple[int, ...]
    partition_dim: int | None
    pieces: tuple[Piece, ...]
    is_primary: bool = True


class TensorSource(Protocol):
    """Logical tensors that can be read in slices: a Hugging Face directory or one of our checkpoints."""

    def names(self) -> Iterable[str]:
        """All logical names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape of a logical tensor."""

    def dtype(self, name: str) -> dtype:
        """Stored type of a logical tensor."""

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        """Elements ``[start, start + length)`` along `dim`, whole along the others; only these are read from disk."""

    def release(self) -> None:
        """All that is needed has been read: files are no longer held in memory, until something is read again."""


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


@dataclass(frozen=True)
class Place:
    """One rank's place in a grid of ranks that share matrices: `expert` says whose experts, `tensor` which part of them."""

    expert: int = 0
    num_expert: int = 1
    tensor: int = 0
    num_tensor: int = 1


def no_experts(hf_config: Any) -> None:
    """Of dense families."""


@dataclass(frozen=True)
class Family:
    """What sets one model family apart.

    Attributes:
        name: transformers' ``model_type``.
        architectures: accepted entries of ``architectures`` in config.json, of language models.
        classifier: the entry of a reward model.
        transformer_config: HF config -> keyword arguments for Megatron's TransformerConfig. Raises UserError for what
            the family can express and megadpo cannot run.
        sliding_windows: HF config -> for each layer, how many tokens (itself included) a token attends to; None = all.
        experts: HF config -> its mixtures of experts; None of a dense model.
    """

    name: str
    architectures: tuple[str, ...]
    classifier: str
    transformer_config: Callable[[Any], dict[str, Any]]
    sliding_windows: Callable[[Any], list[int | None]]
    experts: Callable[[Any], Experts | None] = no_experts


def decoder_config(hf_config: Any, *, add_qkv_bias: bool, qk_layernorm: bool) -> dict[str, Any]:
    """TransformerConfig arguments of a pre-norm decoder with RMSNorm and a SiLU-gated MLP, all four families' shape.

    Raises:
        UserError: another activation, or biases that Megatron's layer has no place for.
    """
    if hf_config.hidden_act != "silu":
        raise UserError(f"the model's hidden_act is {hf_config.hidden_act!r}; only 'silu' is supported")
    for field in ("attention_bias", "mlp_bias"):
        if getattr(hf_config, field, False):
            raise UserError(f"the model's config has {field}: true; {hf_config.model_type} is supported without it only")
    num_heads = hf_config.num_attention_heads
    return {
        "num_layers": hf_config.num_hidden_layers,
        "hidden_size": hf_config.hidden_size,
        "ffn_hidden_size": hf_config.intermediate_size,
        "num_attention_heads": num_heads,
        "num_query_groups": hf_config.num_key_value_heads or num_heads,
        "kv_channels": getattr(hf_config, "head_dim", None) or hf_config.hidden_size // num_heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf_config.rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": add_qkv_bias,
        "qk_layernorm": qk_layernorm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def with_experts(settings: dict[str, Any], experts: Experts | None) -> dict[str, Any]:
    """TransformerConfig arguments of a decoder, with what Megatron's mixture-of-experts layers read.

    No token is dropped, and Megatron's own load balancing is off: model/experts.py routes.
    """
    if experts is None:
        return settings
    return settings | {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.columns,
        "moe_router_topk": experts.per_token,
        "moe_router_pre_softmax": True,
        "moe_router_load_balancing_type": "none",
        "moe_layer_freq": [int(layer in experts.layers) for layer in range(settings["num_layers"])],
    }


def windows_of_layer_types(hf_config: Any) -> list[int | None]:
    """Qwen's rule: the layers that ``layer_types`` calls sliding_attention have the config's window.

    Raises:
        UserError: a kind of layer that is neither full nor sliding attention.
    """
    unknown = set(hf_config.layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UserError(f"the model's layer_types has {sorted(unknown)[0]!r}; only full and sliding attention is supported")
    return [hf_config.sliding_window if kind == "sliding_attention" else None for kind in hf_config.layer_types]
