"""Layouts that a model or a batch cannot be spread over: refused here, before anything starts."""

from __future__ import annotations

from megadpo.errors import UserError
from megadpo.model.shape import Experts, ModelShape
from megadpo.parallel.layout import Layout


def check_layout(layout: Layout, shape: ModelShape, pairs_per_step: int | None = None) -> None:
    """Refuse a layout that the model or the batch cannot be spread over.

    Args:
        pairs_per_step: pairs of a global batch, where the run has any.

    Raises:
        UserError: naming the axis, the model's figure and what to change.
    """
    experts = shape.experts
    divided = {"attention heads": shape.num_heads, "key-value heads": shape.num_key_value_heads}
    if shape.latents is not None:
        latents = shape.latents
        divided["columns of keys' and values' latent (kv_lora_rank + qk_rope_head_dim)"] = (
            latents.key_value_rank + latents.rope_dim
        )
        if latents.query_rank is not None:
            divided["columns of queries' latent (q_lora_rank)"] = latents.query_rank
    if shape.linear is not None:
        divided["key heads of linear attention (linear_num_key_heads)"] = shape.linear.num_key_heads
    if experts is None or len(experts.layers) < shape.num_layers:
        divided["MLP columns"] = shape.ffn_size
    if experts is not None and experts.shared is not None:
        divided["columns of shared experts"] = experts.shared.columns
    for what, number in divided.items():
        if number % layout.tensor:
            raise UserError(
                f"parallel.tensor {layout.tensor} does not divide the model's {number} {what}; "
                f"use one of {_divisors(*divided.values())}"
            )
    if shape.linear is not None and layout.context > 1:
        raise UserError(
            f"parallel.context is {layout.context}, but the model has layers with linear attention, whose state is not "
            "handed from one rank's part of a sequence to the next; leave it at 1"
        )
    _check_experts(layout, experts)
    _check_layers(layout, shape.num_layers)
    if layout.context_method == "ulysses":
        _check_ulysses(layout, shape.num_heads // layout.tensor, shape.num_key_value_heads // layout.tensor)
    if pairs_per_step is not None and pairs_per_step < layout.data:
        raise UserError(
            f"train.pairs_per_step {pairs_per_step} is less than the {layout.data} data-parallel replicas; "
            f"raise it to at least {layout.data} or use fewer processes"
        )


def _check_ulysses(layout: Layout, num_heads: int, num_key_value_heads: int) -> None:
    """Every context rank gets the same number of the tensor rank's heads, and the key-value heads these read."""
    fits = num_heads % layout.context == 0
    fits = fits and (num_key_value_heads % layout.context == 0 or layout.context % num_key_value_heads == 0)
    if not fits:
        raise UserError(
            f"parallel.context_method ulysses cannot spread {num_heads} attention heads with {num_key_value_heads} "
            f"key-value heads (on each of {layout.tensor} tensor ranks) over parallel.context {layout.context}; "
            "set context_method to allgather or auto"
        )


def _check_layers(layout: Layout, num_layers: int) -> None:
    if layout.chunk_layers is not None and sum(layout.chunk_layers) != num_layers:
        raise UserError(
            f"parallel.pipeline_layout {','.join(map(str, layout.chunk_layers))} adds up to {sum(layout.chunk_layers)} "
            f"layers but the model has {num_layers}"
        )
    if num_layers < layout.num_chunks:
        chunks = f" x parallel.virtual_pipeline {layout.virtual}" if layout.virtual > 1 else ""
        raise UserError(
            f"parallel.pipeline {layout.pipeline}{chunks} is more than the model's {num_layers} layers; "
            f"lower it to {num_layers} or less"
        )


def _check_experts(layout: Layout, experts: Experts | None) -> None:
    if experts is None:
        if layout.expert * layout.expert_tensor > 1:
            option = "expert" if layout.expert > 1 else "expert_tensor"
            raise UserError(f"parallel.{option} is {getattr(layout, option)}, but the model has no experts; leave it at 1")
        return
    if experts.count % layout.expert:
        raise UserError(
            f"parallel.expert {layout.expert} does not divide the model's {experts.count} experts; "
            f"use one of {_divisors(experts.count)}"
        )
    if experts.columns % layout.expert_tensor:
        raise UserError(
            f"parallel.expert_tensor {layout.expert_tensor} does not divide the {experts.columns} columns of an expert; "
            f"use one of {_divisors(experts.columns)}"
        )
    if layout.tensor > 1 and not layout.sequence:
        raise UserError(
            f"parallel.sequence is false with parallel.tensor {layout.tensor}, but a model with experts needs it: "
            "without it every tensor rank would route every token; leave it at null"
        )


def _divisors(*numbers: int) -> list[int]:
    return [n for n in range(1, min(numbers) + 1) if all(number % n == 0 for number in numbers)]
