"""What families, model builder and checkpoints share: slices of logical tensors, and where they are read from.

A *logical name* is the Hugging Face parameter name (``model.layers.3.self_attn.q_proj.weight``) with its Hugging Face
shape. Every Megatron parameter shard is a list of contiguous copies, along one dimension, out of logical tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

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


def biases_of_config(hf_config: PretrainedConfig, *fields: str) -> dict[str, bool]:
    """``attention_bias`` is of all four matrices of attention, ``mlp_bias`` of the MLP's, where a config has them.

    Args:
        fields: of the two, those that the family has; none: both.

    Raises:
        UserError: the other one is true.
    """
    both = ("attention_bias", "mlp_bias")
    refuse_biases(hf_config, *(set(both) - set(fields or both)))
    attention, mlp = (bool(getattr(hf_config, field, False)) for field in both)
    return {"qkv_bias": attention, "output_bias": attention, "mlp_bias": mlp}


def refuse_biases(hf_config: PretrainedConfig, *fields: str) -> None:
    """Raises UserError for biases that a config asks for and transformers' model of its family does not have."""
    for field in fields:
        if getattr(hf_config, field, False):
            raise UserError(f"the model's config has {field}: true; {hf_config.model_type} is supported without it only")


def refuse_jitter(hf_config: PretrainedConfig) -> None:
    """Raises UserError for noise in what routers read."""
    if hf_config.router_jitter_noise:
        raise UserError(
            f"the model's router_jitter_noise is {hf_config.router_jitter_noise}; only 0 is supported: with noise, a "
            "reference equal to the policy would give other log-probs"
        )


def layers_with_rope(hf_config: PretrainedConfig) -> list[bool]:
    """``no_rope_layers``, whose ones are the layers that have rope.

    Raises:
        UserError: it is shorter than the model.
    """
    num_layers, has_rope = hf_config.num_hidden_layers, hf_config.no_rope_layers
    if len(has_rope) < num_layers:
        raise UserError(f"the model's no_rope_layers has {len(has_rope)} entries for {num_layers} layers; give one a layer")
    return [bool(each) for each in has_rope[:num_layers]]


def no_biases(hf_config: PretrainedConfig) -> dict[str, Any]:
    """No facts, for families without biases."""
    refuse_biases(hf_config, "attention_bias", "mlp_bias")
    return {}


@dataclass(frozen=True)
class Family:
    """What sets one model family apart.

    Attributes:
        name: transformers' ``model_type``.
        architectures: accepted entries of ``architectures`` in config.json, of language models.
        classifier: the entry of a reward model; None: transformers has none.
        sliding_windows: HF config -> for each layer, how many tokens (itself included) a token attends to; None = all.
        facts: HF config -> fields of ModelShape that are not as in most models.
        experts: HF config -> its mixtures of experts; None of a dense model.
        check: raises UserError for what only this family can express and megadpo cannot run.
        norm_epsilon, activation: the config's fields.
        rotates_part: whether ``partial_rotary_factor`` has a meaning: that part of each head's columns is turned.
        rope_by_layer_type: whether ``rope_parameters`` are those of each kind in ``layer_types``.
        with_rope: HF config -> for each layer, whether it has a rotary embedding; None: all do.
    """

    name: str
    architectures: tuple[str, ...]
    classifier: str | None
    sliding_windows: Callable[[PretrainedConfig], list[int | None]]
    facts: Callable[[PretrainedConfig], Mapping[str, Any]] = biases_of_config
    experts: Callable[[PretrainedConfig], Experts | None] = _no_experts
    check: Callable[[PretrainedConfig], None] = _nothing_to_refuse
    norm_epsilon: str = "rms_norm_eps"
    activation: str = "hidden_act"
    rotates_part: bool = False
    rope_by_layer_type: bool = False
    with_rope: Callable[[PretrainedConfig], list[bool]] | None = None

    @property
    def known_architectures(self) -> tuple[str, ...]:
        """All accepted entries of ``architectures``."""
        return self.architectures if self.classifier is None else (*self.architectures, self.classifier)


def no_windows(hf_config: PretrainedConfig) -> list[int | None]:
    """Every token attends to all before it."""
    return [None] * hf_config.num_hidden_layers


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
