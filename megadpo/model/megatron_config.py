"""Megatron's TransformerConfig of a model in a layout: what it is told, and why."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megadpo.model.activations import Activations
from megadpo.model.layers import Layers
from megadpo.model.shape import ModelShape
from megadpo.parallel.layout import Layout
from megadpo.platform.step_clock import TIMERS


def transformer_config(
    shape: ModelShape, layout: Layout, dtype: torch.dtype, activations: Activations, layers: Layers
) -> TransformerConfig:
    return TransformerConfig(
        **shape.megatron_options(),
        **activations.megatron_options(),
        **layers.megatron_options(),
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        pipeline_model_parallel_layout=_megatron_layout(shape, layout) if layout.pipeline > 1 else None,
        # Between two stages, next and previous are the same rank: forward and backward messages sent in one lot would
        # be taken for each other.
        overlap_p2p_comm=layout.virtual > 1,
        batch_p2p_comm=layout.virtual == 1,
        sequence_parallel=layout.sequence,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # the one that takes streams of different lengths
        # The interleaved schedule takes an output's memory away while it is being sent. NCCL keeps it until it is sent; gloo
        # reads what has come in its place, now and then, on a busy machine.
        deallocate_pipeline_outputs=torch.cuda.is_available() or layout.virtual == 1,
        # With this on, Megatron scales neither the loss nor the gradients: our pair weights are the whole story.
        calculate_per_token_loss=True,
        timers=TIMERS,
        use_te_activation_func=True,  # or any other module in that slot: ours
        gradient_accumulation_fusion=False,  # the engine's to turn on, see weight_gradients.py
        # All of these need Apex or TransformerEngine, or change the rounding.
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )


def _megatron_layout(shape: ModelShape, layout: Layout) -> list[list[str]]:
    """The chunks in Megatron's terms, which count layers from 1 over the whole model by it."""
    rows = [["decoder"] * len(layers) for layers in layout.layers_of_chunks(shape.num_layers)]
    rows[0] = ["embedding", *rows[0]]
    rows[-1] = [*rows[-1], "loss"]
    return rows
