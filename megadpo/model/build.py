"""One pipeline stage of a model: Megatron's GPTModel with our attention, rope, norm and head, filled from a checkpoint."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megadpo.checkpoint.hf import fill_shard
from megadpo.model.attention import GroupAttention
from megadpo.model.families import (
    ParameterShard,
    TensorSource,
    head_of,
    rope_of,
    shard_parameters,
    sliding_windows,
    transformer_config_kwargs,
)
from megadpo.model.head import LogProbHead
from megadpo.model.norm import RMSNorm
from megadpo.model.reward_head import RewardHead
from megadpo.model.rope import PositionRope
from megadpo.parallel.layout import Layout
from megadpo.parallel.partitioned import is_partitioned, own_part, set_whole
from megadpo.platform.megatron_cpu import cpu_tensors_pass_for_cuda


@dataclass
class Stage:
    """What this rank holds of a model.

    Attributes:
        model: the GPTModel of this pipeline stage and tensor rank.
        parameters: by global name (layers numbered over the whole model): the parameter and where its values
            lie in the Hugging Face tensors.
    """

    model: GPTModel
    parameters: dict[str, tuple[torch.nn.Parameter, ParameterShard]]

    @property
    def is_last(self) -> bool:
        """Whether this stage has the head."""
        return self.model.post_process


def build_stage(
    hf_config: Any, layout: Layout, dtype: torch.dtype, recompute: str = "none", device: torch.device | None = None
) -> Stage:
    """This rank's stage with uninitialised parameters; `load_weights` fills them. Needs a joined world.

    Args:
        hf_config: the transformers config; its architecture decides between LogProbHead and RewardHead.
        dtype: of parameters and activations.
        recompute: activations computed again in the backward pass: "none", "selective" (attention) or "full" (layers).
        device: where parameters are made; None: on the compute device.
    """
    layers = layout.layers_of_stage(hf_config.num_hidden_layers, parallel_state.get_pipeline_model_parallel_rank())
    is_first, is_last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    config = _transformer_config(hf_config, layout, dtype, recompute)
    inverse_frequencies, rope_scaling = rope_of(hf_config)
    has_vocabulary = head_of(hf_config) == "logprobs"
    with cpu_tensors_pass_for_cuda(), _made_on(device, config):
        model = (_UnjoinedModel if device else GPTModel)(
            config,
            _block_spec(hf_config, config, len(layers), rope_scaling),
            vocab_size=-(-hf_config.vocab_size // layout.tensor) * layout.tensor,
            max_sequence_length=hf_config.max_position_embeddings,
            pre_process=is_first,
            post_process=is_last,
            parallel_output=True,
            share_embeddings_and_output_weights=has_vocabulary and hf_config.tie_word_embeddings,
            position_embedding_type="rope",
        )
    model.rotary_pos_emb = PositionRope(inverse_frequencies)
    if is_last and has_vocabulary:
        model.output_layer = LogProbHead(model.output_layer.weight, hf_config.vocab_size, layout.sequence)
    elif is_last:
        weight = torch.nn.Parameter(model.decoder.final_layernorm.weight.new_empty(1, hf_config.hidden_size))
        model.output_layer = RewardHead(weight, hf_config.pad_token_id, layout.sequence)
    shards = stage_shards(hf_config, layout, parallel_state.get_tensor_model_parallel_rank())
    return Stage(model, _match(model, shards, layers.start))


class _UnjoinedModel(GPTModel):
    """Does not bring the first stage's embedding to the last one, which needs its values: both are read from files."""

    def _is_in_embd_group(self) -> bool:
        return False


@contextlib.contextmanager
def _made_on(device: torch.device | None, config: TransformerConfig) -> Iterator[None]:
    """Within the block, parameters are made on `device`, which Megatron leaves to torch only in its CPU initialisation."""
    if device is None:
        yield
        return
    config.use_cpu_initialization = True
    with device:
        yield


def stage_shards(hf_config: Any, layout: Layout, tensor_rank: int) -> list[ParameterShard]:
    """What tensor rank `tensor_rank` of this rank's pipeline stage holds."""
    return shard_parameters(
        hf_config,
        tensor_rank=tensor_rank,
        num_tensor=layout.tensor,
        layers=layout.layers_of_stage(hf_config.num_hidden_layers, parallel_state.get_pipeline_model_parallel_rank()),
        has_embedding=parallel_state.is_pipeline_first_stage(),
        has_head=parallel_state.is_pipeline_last_stage(),
    )


def load_weights(stage: Stage, source: TensorSource) -> None:
    """Read every parameter of the stage from `source`, only the part that this rank holds."""
    with torch.no_grad():
        for parameter, shard in stage.parameters.values():
            if not is_partitioned(parameter):
                fill_shard(shard, source, parameter.data)
                continue
            values = torch.empty(shard.shape, dtype=own_part(parameter).dtype, device=own_part(parameter).device)
            fill_shard(shard, source, values)
            set_whole(parameter, values)


def _transformer_config(hf_config: Any, layout: Layout, dtype: torch.dtype, recompute: str) -> TransformerConfig:
    recomputations: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    return TransformerConfig(
        **transformer_config_kwargs(hf_config),
        **recomputations[recompute],
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        sequence_parallel=layout.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # no experts here: Megatron wants it named with variable lengths
        deallocate_pipeline_outputs=True,
        # With this on, Megatron scales neither the loss nor the gradients: our pair weights are the whole story.
        calculate_per_token_loss=True,
        # All of these need Apex or TransformerEngine, or change the rounding.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )


def _block_spec(
    hf_config: Any, config: TransformerConfig, num_layers: int, rope_scaling: float
) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = functools.partial(
        GroupAttention, windows=sliding_windows(hf_config), rope_scaling=rope_scaling
    )
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def _match(
    model: GPTModel, shards: list[ParameterShard], first_layer: int
) -> dict[str, tuple[torch.nn.Parameter, ParameterShard]]:
    """Pair each Megatron parameter with its shard, and mark which are cut over tensor ranks.

    Megatron marks them only while initialising at random; unmarked ones would count once instead of once a rank
    in the gradient norm.
    """
    parameters = {_global_name(name, first_layer): parameter for name, parameter in model.named_parameters()}
    by_name = {shard.name: shard for shard in shards}
    assert parameters.keys() == by_name.keys(), sorted(parameters.keys() ^ by_name.keys())
    for name, parameter in parameters.items():
        shard = by_name[name]
        assert tuple(parameter.shape) == shard.shape, (name, tuple(parameter.shape), shard.shape)
        if not hasattr(parameter, "tensor_model_parallel"):
            partition_dim = -1 if shard.partition_dim is None else shard.partition_dim
            set_tensor_model_parallel_attributes(parameter, shard.partition_dim is not None, partition_dim, 1)
    return {name: (parameters[name], by_name[name]) for name in parameters}


def _global_name(name: str, first_layer: int) -> str:
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + first_layer)
    return ".".join(parts)
