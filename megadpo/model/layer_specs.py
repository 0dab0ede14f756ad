"""What layers are made of, in Megatron's terms: a spec that says which module fills each slot of a layer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megadpo.model.attention.core import GroupAttention
from megadpo.model.attention.latent import LatentAttention
from megadpo.model.attention.packed_projection import PackedSelfAttention
from megadpo.model.four_bit.linear import use_four_bit_layers
from megadpo.model.four_bit.weight import FourBit
from megadpo.model.head_norms import HeadsNorm, ProjectionNorm
from megadpo.model.linear_attention.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megadpo.model.linear_attention.kernels import DeltaRule
from megadpo.model.moe.layer import expert_layer_spec
from megadpo.model.shape import ModelShape
from megadpo.model.small_ops.choice import SmallOps
from megadpo.model.weight_gradients import ColumnLinear, RowLinear, use_own_linear_layers


def softmax_scale(shape: ModelShape) -> float:
    """What scores are multiplied by. Scaling cosine and sine of whole queries and keys (yarn) is scaling their product by
    the square."""
    plain = shape.plain_rope
    scaling = 1.0 if plain is None else plain.scaling**2
    if shape.attention_multiplier is not None:
        return scaling * shape.attention_multiplier
    return scaling / math.sqrt(shape.head_dim)


def block_spec(
    shape: ModelShape,
    layers: range,
    kind: str,
    core_attention: Callable[..., GroupAttention],
    small_ops: SmallOps,
    quantization: FourBit | None,
    products: str | None,
    delta_rule: DeltaRule | None = None,
) -> TransformerBlockSubmodules:
    """The layers with these numbers, and the model's last norm.

    Args:
        kind: "local" or "transformer_engine".
        core_attention: makes what fills the layers' slot of that name.
        products: how experts multiply, where there are some; see `moe.products`.
        delta_rule: what computes linear attention, where there is some.
    """
    experts = shape.experts

    @functools.cache
    def layer_of(is_linear: bool, is_mixture: bool) -> ModuleSpec:
        layer = _layer_spec(shape, kind, core_attention, small_ops)
        if is_linear:
            assert delta_rule is not None
            _use_linear_attention(layer.submodules, shape, delta_rule)
        if is_mixture:
            assert experts is not None and products is not None
            layer = expert_layer_spec(layer, experts, small_ops.activation_of(shape), products)
        return _in_four_bits(layer, quantization)

    specs = [layer_of(layer in shape.linear_layers, experts is not None and layer in experts.layers) for layer in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=small_ops.norm_of(shape))


def _in_four_bits(layer: ModuleSpec, quantization: FourBit | None) -> ModuleSpec:
    """The layer with quantised linear layers, those of experts too; routers and a shared expert's gate stay as they are."""
    if quantization is not None:
        mlp = layer.submodules.mlp.submodules
        experts = getattr(mlp, "experts", None)
        linear = [mlp] if experts is None else [experts.submodules, mlp.shared_experts.submodules]
        use_four_bit_layers([layer.submodules.self_attention.submodules, *linear], quantization)
    return layer


def _layer_spec(
    shape: ModelShape, kind: str, core_attention: Callable[..., GroupAttention], small_ops: SmallOps
) -> ModuleSpec:
    has_norm_of_heads, has_latents = shape.qk_norm is not None, shape.latents is not None
    if kind == "transformer_engine":
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=has_norm_of_heads)
    else:
        layer = get_gpt_layer_local_spec(
            normalization="RMSNorm", qk_layernorm=has_norm_of_heads, multi_latent_attention=has_latents
        )
        norm, norms = small_ops.norm_of(shape), shape.norms
        layer.submodules.input_layernorm = IdentityOp if norms.before_attention is None else norm
        layer.submodules.pre_mlp_layernorm = IdentityOp if norms.before_mlp is None else norm
    layer.submodules.mlp.submodules.activation_func = small_ops.activation_of(shape)
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = core_attention
    if has_latents:
        use_own_linear_layers(layer.submodules.mlp.submodules, None, shape.mlp_bias)
        _use_latent_attention(layer.submodules.self_attention, shape, small_ops)
    elif kind == "local":
        use_own_linear_layers(layer.submodules.mlp.submodules, attention, shape.mlp_bias, shape.output_bias)
        layer.submodules.self_attention.module = PackedSelfAttention
    if has_norm_of_heads:
        attention.q_layernorm = _norm_of_heads(shape, small_ops, shape.num_heads)
        attention.k_layernorm = _norm_of_heads(shape, small_ops, shape.num_key_value_heads)
    return layer


def _use_latent_attention(attention: ModuleSpec, shape: ModelShape, small_ops: SmallOps) -> None:
    """Fill the slots of Megatron's spec of it."""
    attention.module, attention.params = LatentAttention, {**attention.params, "latents": shape.latents}
    slots = attention.submodules
    slots.linear_q_proj = slots.linear_q_down_proj = slots.linear_q_up_proj = ColumnLinear
    slots.linear_kv_down_proj = slots.linear_kv_up_proj = ColumnLinear
    slots.linear_proj = RowLinear
    slots.q_layernorm = slots.kv_layernorm = small_ops.norm_of(shape)


def _use_linear_attention(slots: TransformerLayerSubmodules, shape: ModelShape, delta_rule: DeltaRule) -> None:
    params = {"sizes": shape.linear, "delta_rule": delta_rule}
    slots.self_attention = ModuleSpec(module=GatedDeltaNet, params=params, submodules=GatedDeltaNetSubmodules())


def _norm_of_heads(shape: ModelShape, small_ops: SmallOps, num_heads: int) -> ModuleSpec:
    """The norm of queries or of keys, of which the model has so many heads."""
    norm = small_ops.norm_of(shape)
    if shape.qk_norm == "head":
        return norm
    kind = HeadsNorm if shape.qk_norm == "heads" else ProjectionNorm
    return ModuleSpec(module=kind, params={**norm.params, "num_heads": num_heads})
