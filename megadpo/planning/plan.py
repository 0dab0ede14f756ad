"""A way to run a step: a model's shape in a layout, with all else that decides its memory and its time; and how many numbers
a rank of it holds.

Sizes: h hidden, q and k a token's queries and keys, f the MLP's inner size (of experts, those that a token goes to).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

from megadpo.model.adapters.spec import EMBEDDING_MODULE, HEAD_MODULE, AdapterSpec, all_shapes
from megadpo.model.flop import AdapterWork
from megadpo.model.four_bit.weight import FourBit
from megadpo.model.shape import ModelShape
from megadpo.parallel.layout import Layout
from megadpo.pipeline.fill import policy_schedule
from megadpo.pipeline.schedule import Schedule
from megadpo.pipeline.simulate import peak_activations


@dataclass(frozen=True)
class Plan:
    """A layout with what else is chosen.

    Attributes:
        num_pairs: of a step.
        recompute: as train.recompute, settled: none, small, selective, full.
        capacity: train.tokens_per_micro_batch.
        reference: how it is run: before, interleaved, precomputed, none, or adapter (the policy with its adapters off);
            cached and cached_adapter: before and adapter in the first epoch, whose memory counts, precomputed in the later
            ones, whose time does.
        engine, zero_stage, offload: as in `parallel`.
        number_bytes, gradient_bytes, moment_bytes: of a weight or an activation, of a gradient's sum, of a moment.
        num_moments: that the optimizer keeps of a weight, on average.
        trained_share: of what could be trained, the share that `train.freeze` leaves, the same on every stage.
        activation_offload, window_bytes: as in `train`.
        block_layers: with recompute full and recompute_method block, how many layers of a chunk; None: uniform.
        unit_layers: layers of a uniform unit.
        adapter: what is trained in place of the model.
        four_bit: how its frozen linear layers are quantised.
        on_cpu: whether the ranks compute on CPUs, by torch's operations.
        overlap: whether gradients are summed beside the backward pass.
        fusion: whether products add weights' gradients to where they are kept.
        zero_bubble, split_pairs: as in `schedule`.
    """

    shape: ModelShape
    layout: Layout
    num_pairs: int
    recompute: str = "none"
    capacity: int = 16_384
    reference: str = "before"
    engine: str = "megatron"
    zero_stage: int = 1
    offload: str = "none"
    number_bytes: int = 2
    gradient_bytes: int = 4
    moment_bytes: int = 4
    num_moments: float = 2.0
    trained_share: float = 1.0
    activation_offload: str = "none"
    window_bytes: int = 256 << 20
    block_layers: int | None = None
    unit_layers: int = 1
    adapter: AdapterSpec | None = field(default=None, hash=False)
    four_bit: FourBit | None = None
    on_cpu: bool = False
    overlap: bool = True
    fusion: bool = True
    zero_bubble: bool = False
    split_pairs: bool = False

    @property
    def replicas(self) -> int:
        """Ranks that hold the same part of the model but for its experts: over these optimizer state is spread."""
        return self.layout.data * self.layout.context

    @property
    def has_master_weights(self) -> bool:
        """Whether the optimizer keeps fp32 weights of its own."""
        return self.number_bytes < 4 or (self.engine == "deepspeed" and self.zero_stage > 0)

    @property
    def num_forwards(self) -> int:
        """Forward passes of a step: the policy's, and a live reference's."""
        return 2 if self.reference in ("before", "interleaved", "adapter") else 1

    @property
    def runs_reference(self) -> bool:
        """Whether there are steps, if only in the first epoch, with a reference's forwards."""
        return self.reference not in ("precomputed", "none")

    def schedule(self, num_micro_batches: int) -> Schedule:
        """The policy's operations; beyond some rounds a pipeline only repeats itself."""
        return policy_schedule(*self._sizes(num_micro_batches))

    def under_way(self, num_micro_batches: int) -> tuple[int, ...]:
        """Of each stage: forwards of a chunk (or of a half of a micro-batch) whose backward has not been, at most."""
        return _under_way(*self._sizes(num_micro_batches))

    def _sizes(self, num_micro_batches: int) -> tuple[int, int, int, int, bool]:
        layout = self.layout
        enough = min(num_micro_batches, 6 * layout.pipeline)
        return layout.pipeline, enough, layout.virtual, 2 if self.split_pairs else 1, self.zero_bubble


@functools.cache
def _under_way(*sizes: Any) -> tuple[int, ...]:
    return tuple(peak_activations(policy_schedule(*sizes)))


@functools.cache
def chunk_layers(layout: Layout, num_layers: int) -> list[list[int]]:
    """Layers of each stage's chunks."""
    sizes = [len(layers) for layers in layout.layers_of_chunks(num_layers)]
    return [sizes[stage :: layout.pipeline] for stage in range(layout.pipeline)]


def expert_replicas(layout: Layout) -> int:
    """Ranks that hold the same experts' matrices."""
    return layout.tensor * layout.context * layout.data // (layout.expert * layout.expert_tensor)


@functools.cache
def num_expert_layers(shape: ModelShape, layout: Layout, stage: int) -> int:
    """Layers of a stage that have experts."""
    if shape.experts is None:
        return 0
    if len(shape.experts.layers) == shape.num_layers:
        return sum(chunk_layers(layout, shape.num_layers)[stage])
    chunks = layout.layers_of_chunks(shape.num_layers)[stage :: layout.pipeline]
    return sum(layer in shape.experts.layers for chunk in chunks for layer in chunk)


@functools.cache
def num_linear_layers(shape: ModelShape, layout: Layout, stage: int) -> int:
    """Layers of a stage that have linear attention."""
    if shape.linear is None:
        return 0
    there, chunks = frozenset(shape.linear_layers), layout.layers_of_chunks(shape.num_layers)[stage :: layout.pipeline]
    return sum(layer in there for chunk in chunks for layer in chunk)


def _attention_entries(shape: ModelShape, layout: Layout, stage: int) -> int:
    """Of the matrices of a stage's attention, over all tensor ranks."""
    num_layers, num_linear = sum(chunk_layers(layout, shape.num_layers)[stage]), num_linear_layers(shape, layout, stage)
    softmax, linear = (sum(rows * columns for rows, columns in m) for m in (shape.attention_matrices, shape.linear_matrices))
    return (num_layers - num_linear) * softmax + num_linear * linear


@functools.lru_cache(maxsize=4096)
def parameters_of(shape: ModelShape, layout: Layout, stage: int) -> tuple[float, float]:
    """Of a rank of a stage: those replicated over data and context ranks, and its experts'."""
    h, q, k = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    num_layers, mixtures = sum(chunk_layers(layout, shape.num_layers)[stage]), num_expert_layers(shape, layout, stage)
    num_linear = num_linear_layers(shape, layout, stage)
    attention = 0.0  # of a layer's softmax attention, beside its matrices
    if shape.latents is not None:
        attention += (shape.latents.query_rank or 0) + shape.latents.key_value_rank  # their norms
    attention += ((2 * q if shape.attention_gate else q) + 2 * k) / layout.tensor if shape.qkv_bias else 0
    attention += h if shape.output_bias else 0
    attention += shape.num_heads / layout.tensor if shape.attention_sinks else 0
    if shape.qk_norm is not None:
        attention += 2 * shape.head_dim if shape.qk_norm == "head" else (q + k) / layout.tensor
    mlp = 3 * h * shape.ffn_size / layout.tensor
    mlp += 2 * shape.ffn_size / layout.tensor + h if shape.mlp_bias else 0
    dense = _attention_entries(shape, layout, stage) / layout.tensor + (num_layers - num_linear) * attention
    dense += num_layers * len(shape.norms.names) * h + (num_layers - mixtures) * mlp
    if shape.linear is not None:
        dense += num_linear * (shape.linear.num_small / layout.tensor + shape.linear.value_dim)
    own_experts = 0.0
    if shape.experts is not None:
        count, columns, has_biases = shape.experts.count, shape.experts.columns, shape.experts.has_biases
        dense += mixtures * (h + has_biases + shape.experts.routing.has_correction_bias) * count
        if shape.experts.shared is not None:
            dense += mixtures * (3 * h * shape.experts.shared.columns / layout.tensor + shape.experts.shared.has_gate * h)
        own_experts = 3.0 * h * columns * count / layout.expert / layout.expert_tensor
        own_experts += (2 * columns / layout.expert_tensor + h) * count / layout.expert if has_biases else 0
    vocabulary = math.ceil(shape.vocab_size / layout.tensor) * h
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    ends = vocabulary * is_first + h * is_last
    if is_last and shape.head == "reward":
        ends += h
    elif is_last and not (shape.tied_embeddings and is_first):
        ends += vocabulary
    return dense + ends, mixtures * own_experts


def parameters(plan: Plan, stage: int) -> tuple[float, float]:
    """`parameters_of` a plan."""
    return parameters_of(plan.shape, plan.layout, stage)


def linear_parameters(plan: Plan, stage: int) -> float:
    """Of `parameters`, the entries of linear layers: what is neither norm nor bias, router, embedding nor head."""
    shape, layout = plan.shape, plan.layout
    num_layers, mixtures = sum(chunk_layers(layout, shape.num_layers)[stage]), num_expert_layers(shape, layout, stage)
    dense = _attention_entries(shape, layout, stage) + (num_layers - mixtures) * 3 * shape.hidden_size * shape.ffn_size
    if shape.experts is not None:
        dense += mixtures * 3 * shape.hidden_size * shape.experts.shared_columns
    return dense / layout.tensor + parameters(plan, stage)[1]


ROW_MODULES = ("o_proj", "out_proj", "down_proj", "w2")
"""Linear layers whose inputs are cut over tensor ranks, by the last part of their names; the others' outputs are."""


@functools.lru_cache(maxsize=1024)
def _adapter_of_layer(spec: _Hashable, shape: ModelShape, tensor: int, expert: int) -> tuple[float, float, float]:
    """Mean over layers: an adapter's numbers of a rank, those of experts, and its inner columns of a token."""
    shapes = all_shapes(shape)
    dense = own = inner = 0.0
    for module in spec.spec.modules:
        if module in (EMBEDDING_MODULE, HEAD_MODULE):  # of the ends
            continue
        name, rank = module.rpartition(".")[2], spec.spec.rank_of(module)
        is_expert = ".experts." in module
        shape_out, shape_in = shapes[f"{module}.weight"]
        whole, cut = (shape_out, shape_in) if name in ROW_MODULES else (shape_in, shape_out)
        numbers = rank * (whole + cut / (1 if is_expert else tensor))
        if is_expert:
            own += numbers / expert
        else:
            dense += numbers
            inner += rank
    return dense / shape.num_layers, own / shape.num_layers, inner / shape.num_layers


@dataclass(frozen=True)
class _Hashable:
    """A spec by its identity: its mappings cannot be hashed."""

    spec: AdapterSpec

    def __hash__(self) -> int:
        return id(self.spec)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashable) and other.spec is self.spec


def low_rank_numbers(plan: Plan) -> tuple[float, float, float]:
    """Of a rank's mean layer: the numbers of adapters' A and B, those of experts, and their inner columns of a token."""
    if plan.adapter is None:
        return 0.0, 0.0, 0.0
    return _adapter_of_layer(_Hashable(plan.adapter), plan.shape, plan.layout.tensor, plan.layout.expert)


@functools.lru_cache(maxsize=16)
def _adapter_work(spec: _Hashable, shape: ModelShape) -> AdapterWork:
    return AdapterWork.of(shape, spec.spec)


def adapter_work(plan: Plan) -> AdapterWork | None:
    """The products of what is trained in place of the whole model, which is None."""
    return None if plan.adapter is None else _adapter_work(_Hashable(plan.adapter), plan.shape)


def adapter_numbers(plan: Plan, stage: int) -> tuple[float, float, float]:
    """Of a rank of a stage: what is trained beside a frozen model, that of experts, a layer's inner columns of a token."""
    if plan.adapter is None:
        return 0.0, 0.0, 0.0
    dense, own, inner = low_rank_numbers(plan)
    num_layers = sum(chunk_layers(plan.layout, plan.shape.num_layers)[stage])
    whole = 0.0
    for module in plan.adapter.modules_to_save:  # embedding and head are of the ends, norms are small
        is_here = stage == 0 if "embed" in module else stage == plan.layout.pipeline - 1
        if is_here and not module.endswith("norm"):
            whole += plan.shape.vocab_size * plan.shape.hidden_size / plan.layout.tensor
    for module, at in ((EMBEDDING_MODULE, 0), (HEAD_MODULE, plan.layout.pipeline - 1)):
        if module in plan.adapter.modules and stage == at:
            rows = plan.shape.vocab_size / plan.layout.tensor
            whole += plan.adapter.rank_of(module) * (rows + plan.shape.hidden_size)
    return num_layers * dense + whole, num_layers * own, inner


def trained(plan: Plan, stage: int) -> tuple[float, float]:
    """Numbers of a rank of a stage that are trained: replicated over data and context ranks, and experts'."""
    dense, experts = parameters(plan, stage) if plan.adapter is None else adapter_numbers(plan, stage)[:2]
    return dense * plan.trained_share, experts * plan.trained_share
