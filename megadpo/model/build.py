"""One pipeline stage of a model: Megatron's GPTModel (one for each chunk of the stage) with our attention, rope, norm and
head, filled from a checkpoint."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megadpo.config.schema import ModelConfig
from megadpo.model.activations import KEEP, Activations
from megadpo.model.adapters.attach import attach_adapters, attach_reference_adapters
from megadpo.model.adapters.linear import AdapterSwitch
from megadpo.model.adapters.shards import adapter_shards, is_adapters, is_trained_whole, layer_adapters
from megadpo.model.adapters.spec import AdapterSpec
from megadpo.model.attention.backends import choose_backend
from megadpo.model.attention.base import AttentionBackend, AttentionNeeds
from megadpo.model.attention.core import GroupAttention
from megadpo.model.block import add_norms_after, complete_layers
from megadpo.model.families import (
    ExpertPlace,
    ParameterShard,
    shard_parameters,
)
from megadpo.model.families.shards import EXPERT_BIAS
from megadpo.model.four_bit.linear import without_parameters
from megadpo.model.four_bit.weight import FourBit
from megadpo.model.heads.logprob import GradientBuffer, LogProbHead
from megadpo.model.heads.reward import RewardHead
from megadpo.model.layer_specs import block_spec, softmax_scale
from megadpo.model.layers import Layers, choose_layers, local_name
from megadpo.model.linear_attention.kernels import DeltaRule, choose_delta_rule
from megadpo.model.megatron_config import transformer_config
from megadpo.model.moe.layer import bias_beside, is_expert, moved, with_correction_biases
from megadpo.model.moe.products import choose_expert_products
from megadpo.model.neftune import EmbeddingNoise
from megadpo.model.offload import Offloader, offload_activations
from megadpo.model.recompute import Recomputer, recompute_small
from megadpo.model.residual import join_adds_and_norms
from megadpo.model.shape import ModelShape
from megadpo.model.small_ops.choice import SmallOps, choose_small_ops
from megadpo.parallel.layout import Layout, context_method
from megadpo.platform.device import compute_device
from megadpo.platform.megatron_cpu import cpu_tensors_pass_for_cuda


@dataclass
class Stage:
    """What this rank holds of a model.

    Attributes:
        models: the GPTModel of each chunk of this pipeline stage and tensor rank; one without virtual stages.
        parameters: by global name (layers numbered over the whole model), of all chunks: the parameter and where its
            values lie in the Hugging Face tensors. With adapters, those that are trained: they and what is trained whole.
        base: the others in the same way, with adapters: the model itself, frozen. Of weights in 4 bits the parameter has no
            memory, and its attribute `four_bit` is what is held.
        correction_biases: of routers, in the same way, but for frozen ones: no optimizer moves them, and no engine casts
            or cuts them.
        held: `parameters`, with what `train.freeze` has taken out of them and the correction biases, in the model's order:
            what is saved and exported. With adapters, the model's correction biases are not.
        noise: of the embeddings in training, with `train.neftune_alpha`.
        attention: the name of the backend that computes attention, one of `attention.backends.BACKENDS`.
        layers: what its layers are made of.
        small_ops: what computes norms, SwiGLU and rope, "torch" or "triton".
        expert_products: how the products of a mixture's experts are computed, one of `moe.products.WAYS`; None of a dense
            model.
        linear_attention: what computes the gated delta rule, "torch" or "fla"; None: no layer has one.
        offloader: what offloads activations, where `train.activation_offload` says so.
        activations: what becomes of them between forward and backward pass, `auto` settled.
        recomputer: what computes cheap results again, with `train.recompute: small`.
    """

    models: list[GPTModel]
    parameters: dict[str, tuple[torch.nn.Parameter, ParameterShard]]
    attention: str
    layers: Layers
    small_ops: str
    activations: Activations
    offloader: Offloader | None = None
    recomputer: Recomputer | None = None
    base: dict[str, tuple[torch.nn.Parameter, ParameterShard]] = field(default_factory=dict)
    correction_biases: dict[str, tuple[torch.nn.Parameter, ParameterShard]] = field(default_factory=dict)
    held: dict[str, tuple[torch.nn.Parameter, ParameterShard]] = field(default_factory=dict)
    noise: EmbeddingNoise | None = None
    expert_products: str | None = None
    linear_attention: str | None = None

    def __post_init__(self) -> None:
        for name, parameter in ({} if self.held else self.parameters).items():
            self.held[name] = parameter
            bias = bias_beside(name)
            if not self.base and bias in self.correction_biases:
                self.held[bias] = self.correction_biases[bias]

    @property
    def model(self) -> GPTModel:
        """The model of a stage that is one chunk."""
        (model,) = self.models
        return model

    @property
    def logprob_head(self) -> LogProbHead | None:
        """The log-prob head, where this stage has it."""
        heads = [model.output_layer for model in self.models if model.post_process]
        return heads[0] if heads and isinstance(heads[0], LogProbHead) else None

    def configure_head(
        self, statistics: Collection[str] | None = None, gradient_buffer: GradientBuffer | None = None
    ) -> None:
        """`LogProbHead.configure`, where this stage has that head: a scalar head gives one number, by autograd."""
        if self.logprob_head is not None:
            self.logprob_head.configure(statistics, gradient_buffer)

    @contextlib.contextmanager
    def logps_only(self) -> Iterator[None]:
        """Within the block the head computes log-probs and no other statistic, where this stage has it."""
        head = self.logprob_head
        if head is None:
            yield
            return
        before, head.statistics = head.statistics, ("logp",)
        try:
            yield
        finally:
            head.statistics = before

    def train(self) -> None:
        """Put every chunk into training mode."""
        for model in self.models:
            model.train()


def build_stage(
    shape: ModelShape,
    layout: Layout,
    dtype: torch.dtype,
    activations: Activations = KEEP,
    device: torch.device | None = None,
    options: ModelConfig | None = None,
    adapter: AdapterSpec | None = None,
) -> Stage:
    """This rank's stage with uninitialised parameters; `load_weights` fills them. Needs a joined world.

    Args:
        shape: says among other things which head the model has, LogProbHead or RewardHead.
        dtype: of parameters and activations.
        activations: what becomes of them between forward and backward pass.
        device: where parameters are made; None: on the compute device.
        options: the `model` section, which says by what attention and layers are computed; None: the defaults.
        adapter: the adapters that are trained in place of the model's own parameters.
    """
    options = options or ModelConfig()
    layers = choose_layers(options, compute_device(), dtype, shape.only_local)
    small_ops = choose_small_ops(options.small_ops, compute_device())
    by_own_kernels = compute_device().type == "cuda" and small_ops.name == "triton" and layers.kind == "local"
    activations = activations.settled(small_is_cheap=by_own_kernels)
    config = transformer_config(shape, layout, dtype, activations, layers)
    backend = choose_backend(options.attention, AttentionNeeds.of(shape, compute_device(), dtype))
    quantization = FourBit.of(options)
    products = None
    if shape.experts is not None:
        num_local, has_biases = shape.experts.count // layout.expert, shape.experts.has_biases
        products = choose_expert_products(options.expert_products, num_local, device is not None, has_biases)
    rule_name, delta_rule = None, None
    if shape.linear is not None:
        rule_name, delta_rule = choose_delta_rule(options.linear_attention, compute_device(), dtype)
    models = [
        _build_chunk(shape, layout, config, chunk, device, backend, layers, small_ops, quantization, products, delta_rule)
        for chunk in range(layout.virtual)
    ]
    parameters: dict[str, tuple[torch.nn.Parameter, ParameterShard]] = {}
    tensor_rank, place = parallel_state.get_tensor_model_parallel_rank(), _expert_place(layout)
    switch = AdapterSwitch()
    for chunk, model in enumerate(models):
        shards = _chunk_shards(shape, layout, tensor_rank, chunk, place)
        name_of = functools.partial(_global_name, model, _layers(shape, layout, chunk).start)
        if adapter is not None:
            adapted = layer_adapters(adapter, shards, tensor_rank, place)
            attach_adapters(model, adapted, adapter, switch, name_of)
            shards += [shard for layer in adapted for shard in layer.shards.values()]
        parameters |= _match(model, shards, name_of)
    biases = {name: parameters.pop(name) for name in list(parameters) if name.endswith(f".{EXPERT_BIAS}")}
    base = {} if adapter is None and quantization is None else _freeze(parameters, adapter)
    for model in models:
        without_parameters(model)
    if adapter is not None and activations.recompute == "full" and _has_embedding(0):
        # A checkpointed layer whose input needs no gradient gives none to its parameters either.
        models[0].embedding.register_forward_hook(needs_gradient)
    offloader = offload_activations(models, activations)
    recomputer = recompute_small(models, activations, offloader)
    stage = Stage(models, parameters, backend.name, layers, small_ops.name, activations, offloader, recomputer, base, biases)
    stage.expert_products, stage.linear_attention = products, rule_name
    return stage


def _freeze(
    parameters: dict[str, tuple[torch.nn.Parameter, ParameterShard]], adapter: AdapterSpec | None
) -> dict[str, tuple[torch.nn.Parameter, ParameterShard]]:
    """Take out of `parameters` what is neither an adapter's nor trained whole; without adapters all: it is a reference's."""
    base = {}
    for name, (parameter, shard) in list(parameters.items()):
        is_trained = adapter is not None and (is_adapters(shard) or is_trained_whole(adapter, shard))
        parameter.requires_grad_(is_trained)
        if not is_trained:
            base[name] = parameters.pop(name)
    return base


def needs_gradient(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """A forward hook: what the module puts out needs a gradient, whatever of it is frozen."""
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _build_chunk(
    shape: ModelShape,
    layout: Layout,
    config: TransformerConfig,
    chunk: int,
    device: torch.device | None,
    backend: AttentionBackend,
    layers: Layers,
    small_ops: SmallOps,
    quantization: FourBit | None,
    products: str | None,
    delta_rule: DeltaRule | None,
) -> GPTModel:
    is_first, is_last = _has_embedding(chunk), _has_head(layout, chunk)
    attention = functools.partial(
        GroupAttention,
        reaches=shape.reaches,
        scale=softmax_scale(shape),
        context_method=context_method(layout, shape.num_key_value_heads),
        backend=backend,
        softcap=shape.attention_softcap,
        has_sinks=shape.attention_sinks,
        rotates=shape.latents is None,
    )
    has_vocabulary = shape.head == "logprobs"
    with cpu_tensors_pass_for_cuda(), _made_on(device, config), warnings.catch_warnings():
        # Experts that are whole on each tensor rank are told that there is nothing to split; that is meant.
        warnings.filterwarnings("ignore", message="`sequence_parallel` is set to `True`, but")
        model = (_UnjoinedModel if device else GPTModel)(
            config,
            block_spec(
                shape,
                _layers(shape, layout, chunk),
                layers.kind,
                attention,
                small_ops,
                quantization,
                products,
                delta_rule,
            ),
            vocab_size=-(-shape.vocab_size // layout.tensor) * layout.tensor,
            max_sequence_length=shape.max_positions,
            pre_process=is_first,
            post_process=is_last,
            parallel_output=True,
            share_embeddings_and_output_weights=has_vocabulary and shape.tied_embeddings,
            position_embedding_type="rope",
            vp_stage=chunk if layout.virtual > 1 else None,
        )
        add_norms_after(model, shape, small_ops.norm_of(shape))
    if config.recompute_granularity != "full":
        join_adds_and_norms(model)
    complete_layers(model, shape)
    if is_first and shape.embedding_multiplier != 1.0:
        factor = shape.embedding_multiplier, shape.embedding_module_multiplies
        model.embedding.register_forward_hook(functools.partial(multiplied, *factor))
    model.rotary_pos_emb = small_ops.rope_of(shape)
    if is_last and has_vocabulary:
        model.output_layer = LogProbHead(
            model.output_layer.weight,
            shape.vocab_size,
            layout.sequence,
            multiplier=shape.logits_multiplier,
            softcap=shape.logits_softcap,
        )
    elif is_last:
        weight = torch.nn.Parameter(model.decoder.final_layernorm.weight.new_empty(1, shape.hidden_size))
        model.output_layer = RewardHead(weight, shape.padding_token, layout.sequence)
    return model


def multiplied(multiplier: float, is_rounded: bool, module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """A forward hook: embeddings times a factor, which is rounded to their type where the embedding module has it, as
    Gemma's does."""
    return output * (torch.tensor(multiplier, dtype=output.dtype).item() if is_rounded else multiplier)


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


def expert_ranks() -> tuple[int, int]:
    """This rank's rank in the expert-parallel group, and in the group of the ranks that share each expert's matrices."""
    return parallel_state.get_expert_model_parallel_rank(), parallel_state.get_expert_tensor_parallel_rank()


def stage_shards(
    shape: ModelShape,
    layout: Layout,
    tensor_rank: int,
    expert_rank: int = 0,
    expert_tensor_rank: int = 0,
    adapter: AdapterSpec | None = None,
) -> list[ParameterShard]:
    """What the rank with these numbers holds in this rank's pipeline stage, in all chunks, adapters last."""
    place = ExpertPlace(expert_rank, layout.expert, expert_tensor_rank, layout.expert_tensor)
    shards = [shard for chunk in range(layout.virtual) for shard in _chunk_shards(shape, layout, tensor_rank, chunk, place)]
    return shards + ([] if adapter is None else adapter_shards(adapter, shards, tensor_rank, place))


def add_reference_adapters(
    stage: Stage, shape: ModelShape, layout: Layout, adapter: AdapterSpec
) -> list[tuple[Tensor, ParameterShard]]:
    """Give a stage with adapters a second set, for the reference: buffers to be filled, and where their values lie."""
    tensor_rank, place = parallel_state.get_tensor_model_parallel_rank(), _expert_place(layout)
    buffers: list[tuple[Tensor, ParameterShard]] = []
    for chunk, model in enumerate(stage.models):
        layers = layer_adapters(adapter, _chunk_shards(shape, layout, tensor_rank, chunk, place), tensor_rank, place)
        name_of = functools.partial(_global_name, model, _layers(shape, layout, chunk).start)
        buffers.extend(attach_reference_adapters(model, layers, adapter, name_of))
    return buffers


def _expert_place(layout: Layout) -> ExpertPlace:
    expert, expert_tensor = expert_ranks()
    return ExpertPlace(expert, layout.expert, expert_tensor, layout.expert_tensor)


def _chunk_shards(
    shape: ModelShape, layout: Layout, tensor_rank: int, chunk: int, place: ExpertPlace
) -> list[ParameterShard]:
    return shard_parameters(
        shape,
        tensor_rank=tensor_rank,
        num_tensor=layout.tensor,
        layers=_layers(shape, layout, chunk),
        has_embedding=_has_embedding(chunk),
        has_head=_has_head(layout, chunk),
        expert_place=place,
    )


def _layers(shape: ModelShape, layout: Layout, chunk: int) -> range:
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return layout.layers_of_stage(shape.num_layers, stage, chunk)


def _has_embedding(chunk: int) -> bool:
    return parallel_state.is_pipeline_first_stage() and chunk == 0


def _has_head(layout: Layout, chunk: int) -> bool:
    return parallel_state.is_pipeline_last_stage() and chunk == layout.virtual - 1


def _match(
    model: GPTModel, shards: list[ParameterShard], global_name: Callable[[str], str]
) -> dict[str, tuple[torch.nn.Parameter, ParameterShard]]:
    """Pair each Megatron parameter with its shard, and mark which are cut over tensor ranks, and which are experts'.

    Megatron marks the former only while initialising at random; unmarked ones would count once instead of once a rank
    in the gradient norm. Experts are never replicas over tensor ranks: their replicas are a group of their own, which
    Megatron knows by `allreduce`, and gives them only where there is expert parallelism. What the ranks that share an
    expert's matrices have alike (of adapters) counts once.
    """
    parameters = {global_name(name): parameter for name, parameter in with_correction_biases(model)}
    by_name = {shard.name: shard for shard in shards}
    assert parameters.keys() == by_name.keys(), sorted(parameters.keys() ^ by_name.keys())
    is_expert_shared = model.config.expert_tensor_parallel_size > 1
    for name, parameter in parameters.items():
        shard = by_name[name]
        assert tuple(parameter.shape) == shard.shape, (name, tuple(parameter.shape), shard.shape)
        if is_expert(name):
            setattr(parameter, "allreduce", False)  # noqa: B010
            is_cut = shard.partition_dim is not None or not is_expert_shared
            setattr(parameter, "tensor_model_parallel", is_cut)  # noqa: B010
        elif not hasattr(parameter, "tensor_model_parallel"):
            partition_dim = -1 if shard.partition_dim is None else shard.partition_dim
            set_tensor_model_parallel_attributes(parameter, shard.partition_dim is not None, partition_dim, 1)
    return {name: (parameters[name], by_name[name]) for name in parameters}


def _global_name(model: GPTModel, first_layer: int, name: str) -> str:
    """A parameter's name over the whole model, from the one that it has in a chunk."""
    name = local_name(name)
    if is_expert(name):  # Megatron counts from 0 on every rank
        num_local = (model.config.num_moe_experts or 1) // model.config.expert_model_parallel_size
        name = moved(name, parallel_state.get_expert_model_parallel_rank() * num_local)
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + first_layer)
    return ".".join(parts)
