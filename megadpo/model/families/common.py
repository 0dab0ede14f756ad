"""What families, model builder and checkpoints share: slices of logical tensors, and where they are read from.

A *logical name* is the Hugging Face parameter name (``model.layers.3.self_attn.q_proj.weight``) with its Hugging Face
shape. Every Megatron parameter shard is a list of contiguous copies, along one dimension, out of logical tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, dtype

from megadpo.errors import UserError
from megadpo.model.shape import Experts

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
SCORE = "score.weight"


@dataclass(frozen=True)
class ShardPiece:
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
    pieces: tuple[ShardPiece, ...]
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
class ExpertPlace:
    """One rank among those that share a layer's experts.

    Attributes:
        expert, num_expert: its rank in the expert-parallel group, which decides the experts it holds, and the group's size.
        tensor, num_tensor: its rank among the ranks that share each expert's matrices, and their number.
    """

    expert: int = 0
    num_expert: int = 1
    tensor: int = 0
    num_tensor: int = 1


def _no_experts(hf_config: PretrainedConfig) -> Experts | None:
    return None


def _nothing_to_refuse(hf_config: PretrainedConfig) -> None:
    return None


@dataclass(frozen=True)
class Family:
    """What sets one model family apart.

    Attributes:
        name: transformers' ``model_type``.
        architectures: accepted entries of ``architectures`` in config.json, of language models.
        classifier: the entry of a reward model.
        sliding_windows: HF config -> for each layer, how many tokens (itself included) a token attends to; None = all.
        qkv_bias: whether queries, keys and values have biases.
        qk_norm: whether each head's query and key has an RMSNorm.
        experts: HF config -> its mixtures of experts; None of a dense model.
        check: raises UserError for what only this family can express and megadpo cannot run.
    """

    name: str
    architectures: tuple[str, ...]
    classifier: str
    sliding_windows: Callable[[PretrainedConfig], list[int | None]]
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: Callable[[PretrainedConfig], Experts | None] = _no_experts
    check: Callable[[PretrainedConfig], None] = _nothing_to_refuse


def window_on_every_layer(hf_config: PretrainedConfig) -> list[int | None]:
    """Mistral's rule: every layer has the config's window, whatever ``layer_types`` says."""
    return [hf_config.sliding_window] * hf_config.num_hidden_layers


def windows_of_layer_types(hf_config: PretrainedConfig) -> list[int | None]:
    """Qwen's rule: the layers that ``layer_types`` calls sliding_attention have the config's window.

    Raises:
        UserError: a kind of layer that is neither full nor sliding attention.
    """
    unknown = set(hf_config.layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UserError(f"the model's layer_types has {sorted(unknown)[0]!r}; only full and sliding attention is supported")
    return [hf_config.sliding_window if kind == "sliding_attention" else None for kind in hf_config.layer_types]
