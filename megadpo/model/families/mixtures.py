"""Mixtures of DeepSeek's models and of those built like these: dense layers first, shared experts, groups of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megadpo.errors import UserError
from megadpo.model.shape import Experts, Routing, SharedExpert

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def has_mixtures(hf_config: PretrainedConfig) -> bool:
    """Whether there are layers behind the first `first_k_dense_replace`."""
    return (hf_config.first_k_dense_replace or 0) < int(hf_config.num_hidden_layers)


def experts_after_dense_layers(hf_config: PretrainedConfig, routing: Routing) -> Experts | None:
    """The mixtures of all layers but the first `first_k_dense_replace`; None where that leaves none.

    Raises:
        UserError: no shared expert, or groups that the experts cannot be divided in.
    """
    first, num_layers = hf_config.first_k_dense_replace or 0, hf_config.num_hidden_layers
    if not has_mixtures(hf_config):
        return None
    if (hf_config.n_shared_experts or 0) < 1:
        raise UserError(f"the model's n_shared_experts is {hf_config.n_shared_experts}; it must be 1 or more")
    _check_groups(hf_config, routing)
    return Experts(
        count=hf_config.n_routed_experts,
        per_token=hf_config.num_experts_per_tok,
        columns=hf_config.moe_intermediate_size,
        routing=routing,
        layers=tuple(range(max(first, 0), num_layers)),
        shared=SharedExpert(hf_config.n_shared_experts * hf_config.moe_intermediate_size),
    )


def sigmoid_routing(hf_config: PretrainedConfig) -> Routing:
    """DeepSeek-V3's and GLM-4.5's (`noaux_tc`)."""
    return Routing(
        score_function="sigmoid",
        renormalised=bool(hf_config.norm_topk_prob),
        scaling_factor=float(hf_config.routed_scaling_factor),
        num_groups=hf_config.n_group,
        groups_per_token=hf_config.topk_group,
        group_score="two_best",
        has_correction_bias=True,
        logits_in_float32=True,
    )


def softmax_routing(hf_config: PretrainedConfig) -> Routing:
    """DeepSeek-V2's.

    Raises:
        UserError: another `topk_method` than transformers' model has, or `norm_topk_prob`, which that does not read.
    """
    method = hf_config.topk_method
    if method not in ("greedy", "group_limited_greedy"):
        raise UserError(f"the model's topk_method is {method!r}; supported: greedy, group_limited_greedy")
    if hf_config.norm_topk_prob:
        raise UserError(f"the model's config has norm_topk_prob: true; {hf_config.model_type} is supported without it only")
    is_grouped = method == "group_limited_greedy"
    return Routing(
        scaling_factor=float(hf_config.routed_scaling_factor),
        num_groups=hf_config.n_group if is_grouped else 1,
        groups_per_token=hf_config.topk_group if is_grouped else 1,
        logits_in_float32=True,
    )


def _check_groups(hf_config: PretrainedConfig, routing: Routing) -> None:
    count, groups, chosen = hf_config.n_routed_experts, routing.num_groups, routing.groups_per_token
    if groups is None or chosen is None:
        raise UserError(
            "the model's config has n_group or topk_group: null, and its routing needs both; 1 and 1 is no groups"
        )
    if groups < 1 or count % groups:
        raise UserError(f"the model's n_group is {groups}, which does not divide its {count} experts (n_routed_experts)")
    if not 1 <= chosen <= groups:
        raise UserError(
            f"the model's topk_group is {chosen}, but there are {groups} groups (n_group); it must be 1 to {groups}"
        )
    size, per_token = count // groups, hf_config.num_experts_per_tok
    if routing.group_score == "two_best" and size < 2:
        raise UserError(f"the model's n_group is {groups} of {count} experts, but a group is scored by its best two")
    if per_token < 1:
        raise UserError(f"the model's num_experts_per_tok is {per_token}; it must be 1 or more")
    if per_token > chosen * size:
        raise UserError(
            f"the model's num_experts_per_tok is {per_token}, but a token's {chosen} groups (topk_group) have "
            f"{chosen * size} experts"
        )


def check_given(hf_config: PretrainedConfig, fields: Sequence[str]) -> None:
    """transformers lets some of them be null."""
    for field in fields:
        found = getattr(hf_config, field, None)
        if found is None:
            raise UserError(f"the model's config has no {field}, which {hf_config.model_type} needs; give its number")
        if found < (0 if field == "first_k_dense_replace" else 1):
            raise UserError(f"the model's {field} is {found}; it must be 1 or more")


def refuse_others(hf_config: PretrainedConfig, **known: object) -> None:
    """Refuse what the makers' own code reads and transformers' model does not, unless it is what that computes."""
    for field, value in {"moe_layer_freq": 1, **known}.items():
        found = getattr(hf_config, field, value)
        if found not in (value, None):
            raise UserError(
                f"the model's config has {field}: {found!r}; {hf_config.model_type} is supported with {value!r} only"
            )
