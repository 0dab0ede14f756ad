"""Bytes of tensors on a rank, reckoned: what lies there between steps, and what a step adds to it at its fullest moment.

A step has three parts, each with a peak of its own: the reference's forwards, the policy's forwards and backwards, the
update. What a layer keeps of a token for its backward pass is the table of docs/parallelism.md, here by the operation that
keeps it.

Sizes, of this tensor rank: h hidden (its share under sequence parallelism), q and k a token's queries and keys, f the MLP's
inner size; T tokens of this context rank.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megadpo.model.heads.tile import CPU_TILE_BYTES, CUDA_TILE_SHARE, TILE_ROWS
from megadpo.model.linear_attention.chunks import CHUNK_SIZE
from megadpo.model.offload import MIN_BYTES
from megadpo.model.shape import ModelShape
from megadpo.parallel.layout import Layout, context_method
from megadpo.planning.plan import (
    Plan,
    adapter_numbers,
    chunk_layers,
    expert_replicas,
    linear_parameters,
    num_expert_layers,
    num_linear_layers,
    parameters,
    trained,
)
from megadpo.planning.sums import Sums
from megadpo.planning.workload import MicroBatches, Mix
from megadpo.validation.deepspeed import LARGEST_BUCKET

CARD_BYTES = 80e9
"""A card's memory, of which a tile of logits is a share."""
HOST_MOMENT_BUFFERS = 3 * (32 << 20)
"""Of moments that are on the host between steps (engine/host_moments.py)."""
ZERO_3_WHOLE = 100_000
"""Elements of a parameter that ZeRO-3 leaves whole (stage3_param_persistence_threshold)."""
FULL_GRADIENT_BUCKET = 40_000_000
"""Elements of a gradient bucket; Megatron takes at least a million for each replica."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of tensors on a rank.

    Attributes:
        stage: its pipeline stage.
        between: of each kind, what lies there between steps.
        gradients: of each kind, what the policy's forward and backward passes add at their fullest moment.
        reference, update: bytes that these parts of a step add.
        on_host: of each kind, what waits in the host's memory (or in files) in its place.
    """

    stage: int
    between: dict[str, float]
    gradients: dict[str, float]
    reference: float
    update: float
    on_host: dict[str, float]

    @property
    def added(self) -> dict[str, float]:
        """Of each kind, what the fullest part of a step adds."""
        passes = sum(self.gradients.values())
        if passes >= max(self.reference, self.update):
            return self.gradients
        return {"reference's forward": self.reference} if self.reference > self.update else {"update": self.update}

    @property
    def by_kind(self) -> dict[str, float]:
        """Of each kind, at the step's fullest moment; nothing of 0 bytes."""
        return {kind: size for kind, size in {**self.between, **self.added}.items() if size > 0}

    @property
    def peak(self) -> float:
        """Bytes at the step's fullest moment."""
        return sum(self.by_kind.values())


@dataclass(frozen=True)
class Kept:
    """What an operation of a layer keeps of a token: bytes, under the name of a kind.

    Attributes:
        again: train.recompute small makes it again.
    """

    kind: str
    num_bytes: float
    again: bool = False


STREAM, ATTENTION, MLP, EXPERTS = "residual stream", "attention", "MLP", "experts"
WORKING, TILE, HEAD, BUFFERS = "layer under way", "tile of logits", "head", "communication buffers"
MOVED = "window of what is moved"


def layer_keeps(plan: Plan, mix: Mix, is_mixture: bool, is_linear: bool = False) -> Iterator[Kept]:
    """Of a token of this context rank, in a layer of which nothing is computed again.

    Args:
        is_linear: it has linear attention.
    """
    shape, layout, w = plan.shape, plan.layout, plan.number_bytes
    tensor = layout.tensor
    h = shape.hidden_size / (tensor if layout.sequence else 1)
    norms = shape.norms
    num_before, num_after = (
        sum(name is not None for name in names)
        for names in ((norms.before_attention, norms.before_mlp), (norms.after_attention, norms.after_mlp))
    )
    yield Kept(STREAM, ((1 if shape.is_parallel else 2) + num_after) * h * w)  # what is added to, and normed after
    yield Kept(STREAM, num_before * h * w, again=True)  # norms' results
    yield from _linear_attention_keeps(plan) if is_linear else _attention_keeps(plan, mix)
    if plan.adapter is not None:
        yield Kept("adapters' inner results", adapter_numbers(plan, 0)[2] * w)
    experts = shape.experts
    f = shape.ffn_size / tensor
    if is_mixture:
        assert experts is not None
        f = experts.shared_columns / tensor
    yield Kept(MLP, 2 * f * w)
    yield Kept(MLP, f * w, again=True)  # SwiGLU's result
    if not is_mixture:
        return
    assert experts is not None
    if experts.shared is not None:
        yield Kept(MLP, (h + experts.shared.has_gate * h) * w)  # what it gives, and that without its gate
    share = layout.tensor if layout.sequence else 1  # tokens of a tensor rank
    routed, columns = experts.per_token / share, experts.columns / layout.expert_tensor
    if layout.expert_tensor > 1:
        routed *= layout.expert_tensor
    if experts.routing.scales_inputs:
        yield Kept(EXPERTS, routed * 2 * (shape.hidden_size + columns) * w)  # in, out, gate, up
        yield Kept(EXPERTS, routed * shape.hidden_size * w, again=True)  # in times the probability
    else:
        yield Kept(EXPERTS, routed * (2 * shape.hidden_size + 3 * columns) * w)  # in, out, gate, up, times the probability
    yield Kept(EXPERTS, routed * columns * w, again=True)
    yield Kept(EXPERTS, 16 * experts.count / share)  # router: logits, probabilities, choices


def _attention_keeps(plan: Plan, mix: Mix) -> Iterator[Kept]:
    shape, layout, w = plan.shape, plan.layout, plan.number_bytes
    tensor, heads, groups = layout.tensor, shape.num_heads / layout.tensor, shape.num_key_value_heads / layout.tensor
    q, k = heads * shape.head_dim, groups * shape.head_dim
    yield Kept(ATTENTION, (q + 2 * k) * w)  # the packed projection
    if shape.attention_gate:
        yield Kept(ATTENTION, 3 * q * w)  # in it the gates, a copy of these, and their sigmoid
        yield Kept(ATTENTION, q * w, again=True)  # the gated result
    yield Kept(ATTENTION, heads * shape.value_dim * w)  # attention's result
    if shape.latents is not None:
        latents = ((shape.latents.query_rank or 0) + shape.latents.key_value_rank) / (tensor if layout.sequence else 1)
        yield Kept(ATTENTION, latents * w)
        yield Kept(ATTENTION, latents * w, again=True)  # their norms' results
    yield Kept(ATTENTION, 4 * (2 + heads + (heads + groups if shape.qk_norm else 0)))  # rows' scales, log-sum-exp
    if shape.norms_turned:
        share = sum(rope is not None for rope in shape.ropes) / shape.num_layers
        yield Kept(ATTENTION, 4 * share * (heads + groups))
        yield Kept(ATTENTION, share * (q + k) * w, again=True)  # rope's results, which the norm reads
    method = context_method(layout, shape.num_key_value_heads)
    if plan.on_cpu:
        if shape.qk_norm:
            yield Kept(ATTENTION, q * w, again=True)  # a copy of the queries
        yield Kept(ATTENTION, (q + k + 4 * shape.head_dim) * w)  # rope's results, cosines and sines
        if method is not None:  # what came from the other ranks, or goes to them
            yield Kept(ATTENTION, (q + 2 * k if method == "ulysses" else 2 * k * layout.context - k) * w)
    else:
        yield Kept(ATTENTION, q * w, again=True)  # rope's
        yield Kept(ATTENTION, 2 * mix.keys * q * w, again=True)  # keys and values copied behind prompts, and repeated
        if method == "allgather":
            yield Kept(ATTENTION, 2 * k * layout.context * w)


def _linear_attention_keeps(plan: Plan) -> Iterator[Kept]:
    linear, w = plan.shape.linear, plan.number_bytes
    assert linear is not None
    convolved, outputs, heads = (
        each / plan.layout.tensor for each in (linear.num_convolved, linear.num_outputs, linear.num_value_heads)
    )
    yield Kept(ATTENTION, convolved * w)  # what the convolution reads
    yield Kept(ATTENTION, convolved * w)  # and gives
    yield Kept(ATTENTION, convolved * w, again=True)  # SiLU's results, which the delta rule reads
    yield Kept(ATTENTION, 2 * outputs * w)  # what that gives, and the gates
    yield Kept(ATTENTION, outputs * w, again=True)  # the gated norm's results
    yield Kept(ATTENTION, (12 + 2 * w) * heads)  # decays, in float32, and rates


def kept_by_kind(plan: Plan, mix: Mix, is_mixture: bool, recompute: str, num_tokens: float, is_linear: bool = False) -> Sums:
    """Bytes that a layer keeps of so many tokens; with offloaded activations, large ones under MOVED."""
    if recompute == "full":
        h = plan.shape.hidden_size / (plan.layout.tensor if plan.layout.sequence else 1)
        found = [Kept(STREAM, h * plan.number_bytes)]
    else:
        found = [each for each in layer_keeps(plan, mix, is_mixture, is_linear) if recompute != "small" or not each.again]
    kinds = Sums()
    for each in found:
        is_moved = plan.activation_offload != "none" and each.num_bytes * num_tokens >= MIN_BYTES
        kinds[MOVED if is_moved else each.kind] += each.num_bytes * num_tokens
    return kinds


def layer_works_with(plan: Plan, mix: Mix, is_mixture: bool, backward: bool, is_linear: bool = False) -> tuple[float, float]:
    """The most that the operations of a layer under way need beside what is kept: bytes of a token, and bytes in all.

    Backward, that is SwiGLU's gradient with what it is made of, or attention's; and where the products do not add to where
    gradients are kept, the gradient of a matrix. A quantised matrix is made dense for its product.
    """
    shape, layout, w = plan.shape, plan.layout, plan.number_bytes
    tensor = layout.tensor
    h, own_h = shape.hidden_size, shape.hidden_size / (tensor if layout.sequence else 1)
    q, k = shape.num_heads * shape.head_dim / tensor, shape.num_key_value_heads * shape.head_dim / tensor
    if is_linear:
        q = k = 0.0
    rule = delta_rule_works_with(plan, backward) if is_linear else 0.0
    f = shape.ffn_size / tensor
    if is_mixture:
        assert shape.experts is not None
        f = shape.experts.per_token * shape.experts.columns / layout.expert_tensor / (tensor if layout.sequence else 1)
        f = max(f, shape.experts.shared_columns / tensor)  # one after the other
    in_all = 0.0
    if plan.four_bit is not None:  # the widest: gate and up are one
        inner = shape.ffn_size / tensor
        if is_mixture and shape.experts is not None:
            inner = max(shape.experts.columns / layout.expert_tensor, shape.experts.shared_columns / tensor)
        of_attention = max(rows * columns for rows, columns in shape.attention_matrices)
        in_all = w * max(of_attention / tensor, 2 * h * inner)
    if not backward:
        return w * (2 * own_h + h) + max(w * max(3 * f, 3 * q + 4 * k), rule), in_all
    if plan.on_cpu:  # the MLP's results are gone when attention goes backward, which there pads queries, keys and values
        of_token = w * max(own_h + h + 3 * f, own_h + 9 * q + 2 * k - 3 * f, 6 * own_h)
        of_token = max(of_token, w * own_h + rule)
        return of_token, in_all if plan.fusion or plan.adapter is not None else 2.0 * w * shape.hidden_size * f
    return max(w * max(own_h + h + 3 * f, own_h + 3 * q + 2 * mix.keys * q), w * own_h + rule), in_all


def delta_rule_works_with(plan: Plan, backward: bool) -> float:
    """Bytes of a token that linear attention's rule needs while it is computed, by torch's operations in float32: what goes
    in by chunks, the system and its solution, states; backward all of it, which autograd keeps, and the gradients."""
    linear = plan.shape.linear
    assert linear is not None
    keys, heads, K, V = linear.num_key_heads, linear.num_value_heads, linear.key_dim, linear.value_dim
    inputs = 4 * keys * K + 2 * heads * V
    solved = 2 * heads * (K + V) + 4 * heads * CHUNK_SIZE
    of_steps = 2 * heads * K + 2 * heads * V + 2 * heads * K * V / CHUNK_SIZE
    return 4 * (inputs + solved + of_steps) * (2 if backward else 1) / plan.layout.tensor


def between_steps(plan: Plan, stage: int) -> tuple[dict[str, float], dict[str, float]]:
    """Of each kind, bytes of the model's and the optimizer's state: on the device, and on the host."""
    dense, experts = parameters(plan, stage)
    own_dense, own_experts = trained(plan, stage)
    w, g, zero_3 = plan.number_bytes, plan.gradient_bytes, plan.engine == "deepspeed" and plan.zero_stage == 3
    cut, cut_of_experts = (plan.replicas, expert_replicas(plan.layout)) if zero_3 else (1, 1)
    held = w * (dense + experts)
    if zero_3:
        small, small_experts = small_parameters(plan, stage)
        held = w * (small + (dense - small) / cut + small_experts + (experts - small_experts) / cut_of_experts)
    if plan.four_bit is not None:
        linear = linear_parameters(plan, stage)
        held += plan.four_bit.num_bytes(round(linear)) - w * linear
    kinds = Sums()
    host = Sums()
    kinds["weights"] = held
    if plan.adapter is not None:
        kinds["adapters"] = w * (own_dense / cut + own_experts / cut_of_experts) / plan.trained_share
    if plan.reference in ("before", "interleaved", "cached"):
        kinds["reference"] = held
    for numbers, replicas in ((own_dense, plan.replicas), (own_experts, expert_replicas(plan.layout))):
        if not numbers:
            continue
        share, whole = numbers / replicas, numbers
        if plan.engine == "megatron":
            kinds["gradients"] += g * whole
            (host if plan.offload == "cpu" else kinds)["optimizer"] += plan.num_moments * plan.moment_bytes * share
            kinds["optimizer"] += 4 * share if plan.has_master_weights else 0
        elif plan.zero_stage == 0:
            kinds["gradients"] += 4 * whole
            kinds["optimizer"] += 4 * plan.num_moments * whole
        else:
            away = host if plan.offload != "none" else kinds
            away["optimizer"] += (4 + 4 * plan.num_moments) * share
    if plan.engine == "megatron" and plan.offload == "cpu":
        kinds["optimizer"] += HOST_MOMENT_BUFFERS
    if zero_3 and plan.offload != "none":
        for kind in ("weights", "reference"):
            host[kind] = kinds.pop(kind, 0.0)
    return dict(kinds), dict(host)


def small_parameters(plan: Plan, stage: int) -> tuple[float, float]:
    """Numbers of a rank's matrices in layers that ZeRO-3 does not cut, and of those of experts: DeepSpeed's default leaves
    small ones whole."""
    shape, layout = plan.shape, plan.layout
    h = shape.hidden_size

    def small(columns: Iterable[float], ranks: int) -> float:
        return sum(h * each / ranks for each in columns if h * each / ranks <= ZERO_3_WHOLE)

    num_layers, mixtures = sum(chunk_layers(layout, shape.num_layers)[stage]), num_expert_layers(shape, layout, stage)
    num_linear = num_linear_layers(shape, layout, stage)
    dense = 0.0
    for number, matrices in ((num_layers - num_linear, shape.attention_matrices), (num_linear, shape.linear_matrices)):
        dense += number * small((rows * columns / h for rows, columns in matrices), layout.tensor)
    dense += (num_layers - mixtures) * small((2 * shape.ffn_size, shape.ffn_size), layout.tensor)
    if shape.experts is None:
        return dense, 0.0
    shared = shape.experts.shared_columns
    dense += mixtures * small((2 * shared, shared), layout.tensor)
    f, num_local = shape.experts.columns, shape.experts.count / layout.expert
    return dense, mixtures * num_local * small((2 * f, f), layout.expert_tensor)


def tile_bytes(plan: Plan, num_scored: float) -> float:
    """Of the largest tile of logits."""
    row = plan.shape.vocab_size / plan.layout.tensor * plan.number_bytes
    most = CPU_TILE_BYTES if plan.on_cpu else CARD_BYTES / CUDA_TILE_SHARE
    return min(num_scored, TILE_ROWS, max(1, most // row)) * row


def rank_memory(plan: Plan, mix: Mix, micro_batches: MicroBatches, stage: int) -> RankMemory:
    """What a rank of a pipeline stage holds."""
    between, host = between_steps(plan, stage)
    layout, shape, w = plan.layout, plan.shape, plan.number_bytes
    is_last, has_head = stage == layout.pipeline - 1, shape.head == "logprobs"
    under_way = plan.under_way(micro_batches.count)[stage]
    halves = 2 if plan.split_pairs else 1
    together = max(1, -(-under_way // layout.virtual // halves))
    one = micro_batches.most_tokens(1) / layout.context
    # Forwards of chunks that wait for their backward, in tokens.
    waiting = micro_batches.most_tokens(together) / layout.context * under_way / (together * layout.virtual * halves)
    kept = Sums()
    for is_mixture, is_linear, num_layers, recomputed in _layers(plan, stage):
        for kind, size in kept_by_kind(plan, mix, is_mixture, recomputed, one, is_linear).items():
            kept[kind] += size / one * waiting * num_layers
    if kept[MOVED]:
        host["activations"] = kept[MOVED]
        kept[MOVED] = min(kept[MOVED], 2.0 * plan.window_bytes)
    kinds = {(is_mixture, is_linear) for is_mixture, is_linear, _, _ in _layers(plan, stage)}
    scored = mix.scored * one
    own_h = shape.hidden_size / (layout.tensor if layout.sequence else 1)
    if plan.on_cpu:
        kept["masks of attention"] = micro_batches.mask_bytes * w / 4 * together
    working = _works_with(plan, mix, kinds, True, one) + _made_again(plan, mix, stage, one)
    tile = tile_bytes(plan, scored) if is_last and has_head else 0.0
    # Before the last layer's backward: the last norm's input and result, the rows that are scored and their gradients.
    streams = 2 if plan.recompute in ("small", "full") else 3
    head = tile + (2 * scored * shape.hidden_size + streams * own_h * one) * w if tile else 0.0
    passes = dict(kept)
    passes |= {TILE: tile, HEAD: head - tile} if head > working else {WORKING: working}
    passes[BUFFERS] = _buffers(plan, stage, one)
    if plan.engine == "deepspeed" and plan.zero_stage > 0:
        away = host if plan.offload != "none" else passes
        away["gradients"] = 4 * trained(plan, stage)[0] / (plan.replicas if plan.zero_stage > 1 else 1)
    reference = 0.0
    if plan.runs_reference:
        reference = max(
            _works_with(plan, mix, kinds, False, one), tile + (scored + 2 * one) * shape.hidden_size * w if tile else 0.0
        )
        reference += kept["masks of attention"] / together
    return RankMemory(stage, between, passes, reference, _update(plan, stage), host)


def _works_with(plan: Plan, mix: Mix, kinds: Iterable[tuple[bool, bool]], backward: bool, num_tokens: float) -> float:
    """Bytes of a micro-batch: of kinds of layers (has experts, has linear attention), that which needs most."""
    found = (layer_works_with(plan, mix, is_mixture, backward, is_linear) for is_mixture, is_linear in kinds)
    return max(of_token * num_tokens + in_all for of_token, in_all in found)


def _made_again(plan: Plan, mix: Mix, stage: int, num_tokens: float) -> float:
    """What a unit of layers keeps while it is computed again, beyond what the layers have kept whose backward is over: with
    the method block these are the last ones."""
    if plan.recompute != "full":
        return 0.0
    is_mixture, is_linear, _ = _kinds(plan.shape, plan.layout, stage)[-1]
    whole = sum(kept_by_kind(plan, mix, is_mixture, "none", num_tokens, is_linear).values())
    if plan.block_layers is None:
        return plan.unit_layers * whole
    chunk = max(chunk_layers(plan.layout, plan.shape.num_layers)[stage])
    return max(0.0, 1 - (chunk - plan.block_layers)) * whole


def moved_bytes(plan: Plan, mix: Mix, stage: int, num_tokens: float) -> float:
    """Bytes of a micro-batch's activations that are moved away and back."""
    return sum(
        kept_by_kind(plan, mix, is_mixture, recomputed, num_tokens, is_linear)[MOVED] * num_layers
        for is_mixture, is_linear, num_layers, recomputed in _layers(plan, stage)
    )


@functools.lru_cache(maxsize=4096)
def _kinds(shape: ModelShape, layout: Layout, stage: int) -> tuple[tuple[bool, bool, int], ...]:
    """(whether they have experts, whether linear attention, how many) of a stage's layers."""
    if shape.linear is None:
        count = num_expert_layers(shape, layout, stage)
        rest = sum(chunk_layers(layout, shape.num_layers)[stage]) - count
        return tuple((is_mixture, False, number) for is_mixture, number in ((False, rest), (True, count)) if number)
    chunks = layout.layers_of_chunks(shape.num_layers)[stage :: layout.pipeline]
    mixtures = frozenset(() if shape.experts is None else shape.experts.layers)
    linear = frozenset(shape.linear_layers)
    counts = Counter((layer in mixtures, layer in linear) for chunk in chunks for layer in chunk)
    return tuple((*kind, number) for kind, number in sorted(counts.items()))


def _layers(plan: Plan, stage: int) -> list[tuple[bool, bool, float, str]]:
    """(whether they have experts, whether linear attention, how many, how they are recomputed) of a stage's layers."""
    found: list[tuple[bool, bool, float, str]] = []
    chunk = max(chunk_layers(plan.layout, plan.shape.num_layers)[stage])
    for is_mixture, is_linear, number in _kinds(plan.shape, plan.layout, stage):
        if plan.recompute != "full":
            found.append((is_mixture, is_linear, number, plan.recompute))
        elif plan.block_layers is None:
            found.append((is_mixture, is_linear, number / plan.unit_layers, "full"))
        else:
            again = min(1.0, plan.block_layers / chunk)
            found.append((is_mixture, is_linear, number * again, "full"))
            found.append((is_mixture, is_linear, number * (1 - again), "none"))
    return found


def _buffers(plan: Plan, stage: int, num_tokens: float) -> float:
    """Gathered inputs of tensor ranks, messages between stages, DeepSpeed's gradients on their way, what ZeRO-3 gathers."""
    layout, w = plan.layout, plan.number_bytes
    found = 0.0
    if layout.sequence:
        found += plan.shape.hidden_size * w * num_tokens
    if layout.pipeline > 1:
        own_h = plan.shape.hidden_size / (layout.tensor if layout.sequence else 1)
        found += 2 * own_h * w * num_tokens
    if plan.engine == "deepspeed" and plan.zero_stage > 0:
        found += 4 * min(LARGEST_BUCKET, trained(plan, stage)[0] / 20)
    if plan.engine == "deepspeed" and plan.zero_stage == 3:  # parameters of the module under way
        num_layers, h = sum(chunk_layers(layout, plan.shape.num_layers)[stage]), plan.shape.hidden_size
        vocabulary = plan.shape.vocab_size * h / layout.tensor if stage in (0, layout.pipeline - 1) else 0.0
        body = parameters(plan, stage)[0] - small_parameters(plan, stage)[0]
        found += w * max(vocabulary, (body - vocabulary) / num_layers)
    return found


def _update(plan: Plan, stage: int) -> float:
    """An fp32 copy of gradients that are kept in bf16; on CPUs, where gloo gathers parameters, a copy of these."""
    dense, experts = trained(plan, stage)
    found = 0.0
    if plan.gradient_bytes < 4 and plan.engine == "megatron":
        found += 4 * (dense / plan.replicas + experts / expert_replicas(plan.layout))
    if plan.on_cpu and plan.replicas > 1:
        found += plan.number_bytes * dense
    return found
