"""The arithmetic of `benchmarks predict`: seconds and memory of a step in a layout, from rates.

Every sum says what it counts. What a rate stands for, and where it comes from, is said once, in `Rates`. Sizes: h hidden,
q and k a token's queries and keys, f the MLP's inner size (of experts, those that a token goes to together).
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from benchmarks.flop import attention_pairs
from benchmarks.material import synthetic_groups
from megadpo.data.batches.bin_packing import pack_micro_batches
from megadpo.model.shape import ModelShape
from megadpo.parallel.layout import Layout, context_method
from megadpo.pipeline.fill import Progress, policy_schedule, with_reference, with_reference_before
from megadpo.pipeline.simulate import Costs, peak_activations, simulate

VOCABULARY = 151_936
MIX = "UltraFeedback-like"
BUCKET = 40e6
"""Elements of a gradient bucket; Megatron takes at least a million for each replica."""


def _rate(default: float, source: str, text: str) -> Any:
    return field(default=default, metadata={"source": source, "help": text})


@dataclass(frozen=True)
class Rates:
    """What a card and its network do; the source of each says whether that was seen."""

    peak: float = _rate(989e12, "data sheet", "FLOP/s of dense bf16, which MFU is against")
    products: float = _rate(0.81, "measured", "share of the peak that products of many rows (tokens) reach")
    half_rows: float = _rate(200, "assumed", "rows of a product that reaches half of that: few are slow")
    attention: float = _rate(97e12, "measured", "FLOP/s of attention's kernels at these lengths; a backward is two forwards")
    memory: float = _rate(
        2.5e12, "measured", "bytes/s of norms, SwiGLU, rope, copies, sums and the optimizer, read and written"
    )
    rest: float = _rate(
        0.07, "measured", "kernels without a name here and gaps between kernels, as a share of the named ones"
    )
    launch: float = _rate(5e-6, "assumed", "seconds of the host for a kernel, of which a layer's forward has 26")
    nvlink: float = _rate(330e9, "assumed", "bytes/s that a rank sends inside a node, of 450e9")
    network: float = _rate(40e9, "assumed", "bytes/s that a GPU's own 400 Gb/s adapter sends, of 50e9")
    latency: float = _rate(20e-6, "assumed", "seconds of a collective for each doubling of its ranks, and of a message")
    hidden: float = _rate(0.8, "assumed", "share of the computing beside which an overlapped message can hide")
    expert_imbalance: float = _rate(1.2, "assumed", "tokens of the busiest rank's experts, over the mean")
    node: int = _rate(8, "data sheet", "GPUs of a node")
    gib: float = _rate(72.0, "assumed", "memory that may be planned for, of a card's 79 GiB")

    def product_rate(self, rows: float) -> float:
        """FLOP/s of products of so many rows."""
        return self.products * self.peak * rows / (rows + self.half_rows)

    def bandwidth(self, stride: int, size: int) -> float:
        """Bytes/s a rank sends in a ring over `size` ranks, each `stride` after the one before: the ranks of a node share
        its adapters' way out."""
        inside = max(1, min(size, self.node // stride))
        return self.nvlink if inside == size else min(self.nvlink, inside * self.network)

    def ring(self, num_bytes: float, stride: int, size: int) -> float:
        """Seconds of an all-gather or a reduce-scatter whose whole is `num_bytes`."""
        if size == 1:
            return 0.0
        return num_bytes * (size - 1) / size / self.bandwidth(stride, size) + self.latency * math.log2(size)

    def all_to_all(self, num_bytes: float, stride: int, size: int) -> float:
        """Seconds where each of `size` ranks has `num_bytes` and keeps its own part."""
        if size == 1:
            return 0.0
        inside = max(1, min(size, self.node // stride))
        within, across = (inside - 1) / size / self.nvlink, (size - inside) / size / self.network
        return num_bytes * (within + across) + self.latency * math.log2(size)


@dataclass(frozen=True)
class Mix:
    """Means over pairs: tokens of a pair, and of its tokens the share that is scored, the query-key pairs of each, and the
    keys that attention's kernels read for each (a prompt's are copied for each answer)."""

    pair: float
    scored: float
    attended: float
    keys: float


@functools.cache
def _groups(count: int) -> tuple[Any, ...]:
    return tuple(synthetic_groups(MIX, count, VOCABULARY, longest=2048))


@functools.cache
def mix_of(num_pairs: int) -> Mix:
    """Of the first pairs, on which the card was measured."""
    groups = _groups(num_pairs)
    tokens = sum(group.num_stream_tokens(True) for group in groups)
    prompts = sum(len(group.prompts[0]) for group in groups)
    attended = sum(map(attention_pairs, groups))
    return Mix(tokens / num_pairs, 1 - prompts / tokens, attended / tokens, 1 + 2 * prompts / tokens)


@functools.cache
def packing(num_pairs: int, data: int, capacity: int, multiple_of: int) -> tuple[int, float]:
    """Micro-batches of each replica, and the work of the busiest replica over the mean, as the package packs pairs."""
    while num_pairs > 2048 and num_pairs % 2 == data % 2 == 0:  # so many replicas show it as well as all do
        num_pairs, data = num_pairs // 2, data // 2
    tokens = [group.num_stream_tokens(True) for group in _groups(num_pairs)]
    ranks = pack_micro_batches(tokens, tokens, capacity, data, multiple_of)
    return len(ranks[0]), max(sum(tokens[n] for each in rank for n in each) for rank in ranks) * data / sum(tokens)


@dataclass(frozen=True)
class Plan:
    """A layout with what else is chosen: train.recompute, train.tokens_per_micro_batch, and how the reference is run
    (before, interleaved, precomputed)."""

    shape: ModelShape
    layout: Layout
    num_pairs: int
    recompute: str = "none"
    capacity: int = 16_384
    reference: str = "before"


@dataclass(frozen=True)
class Step:
    """A predicted step: its seconds by what they go to, and the memory of the fullest rank."""

    plan: Plan
    seconds_by: dict[str, float]
    gib: float
    num_micro_batches: int
    mfu: float

    @property
    def seconds(self) -> float:
        return sum(self.seconds_by.values())

    def bounds(self) -> list[tuple[str, float]]:
        """What the step's time goes to, with its share, largest first."""
        return [(name, each / self.seconds) for name, each in Counter(self.seconds_by).most_common()]


def layer_seconds(plan: Plan, mix: Mix, rates: Rates, tokens: float) -> tuple[Counter[str], Counter[str]]:
    """A layer's forward and backward of a micro-batch of `tokens`, by what they go to.

    Numbers moved are of bf16: each operation reads its inputs and writes its results once, as in benchmarks/results.md.
    Under sequence parallelism a tensor rank has its share of all of them.
    """
    shape, layout = plan.shape, plan.layout
    h, q, k = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    experts, tensor = shape.experts, layout.tensor
    inner = shape.ffn_size if experts is None else experts.per_token * experts.columns
    own = tokens / layout.context
    product, copied = own / tensor / rates.product_rate(own), 2 * own / tensor / rates.memory
    products, busiest = _dense_products(shape) * product, 0.0
    head_norms = q + k if shape.qk_norm else 0
    moved = 4 * h + 2 * head_norms + 2 * (q + k) + 3 * inner + 6 * h  # norms, rope, SwiGLU, residual adds
    moved += 2 * k + 2 * mix.keys * q + 2 * (q + k)  # keys gathered and repeated for their readers; strided copies
    moved_back = 6 * h + 3 * head_norms + 2 * (q + k) + 5 * inner + 6 * h + 2 * mix.keys * q + 2 * k + 2 * q + 6 * k
    num_launches = 26.0
    if experts is not None:
        routed = 6 * experts.per_token * h  # sorted by expert here and there, and back
        moved, moved_back = moved + routed, moved_back + routed
        num_launches += 8 * experts.count / layout.expert
        routed_rows = own / tensor * experts.per_token * layout.expert / experts.count
        expert_products = 3 * h * inner * own / tensor / rates.product_rate(routed_rows)
        products += expert_products
        busiest = (rates.expert_imbalance - 1) * expert_products if layout.expert > 1 else 0.0
    attention = 4 * q / tensor * own * mix.attended / rates.attention
    forward = Counter(
        {
            "matrix products": 2 * products,
            "attention": attention,
            "memory-bound kernels": moved * copied,
        }
    )
    backward = Counter(
        {
            "matrix products": 4 * products,
            "attention": 2 * attention,
            "memory-bound kernels": moved_back * copied,
        }
    )
    for way, times in ((forward, 1), (backward, 2)):
        way["launches and the rest"] = _rest(way, rates, times * num_launches)
        if experts is not None:
            way["imbalance"] = times * 2 * busiest
            way["expert messages"] = 2 * rates.all_to_all(2 * own / tensor * experts.per_token * h, 1, layout.expert)
        way["context messages"] = _context_seconds(plan, rates, own, q, k)
    _add_tensor_messages(forward, backward, plan, rates, own, product)
    return forward, backward


def _rest(way: Counter[str], rates: Rates, num_launches: float) -> float:
    """Kernels that have no name here, and what the host needs to launch all if that is longer."""
    named = sum(way.values())
    return max(rates.rest * named, num_launches * rates.launch - named)


def _dense_products(shape: ModelShape) -> int:
    """Weights of a layer that a token is multiplied with, but those of experts."""
    attention = 2 * shape.hidden_size * (shape.num_heads + shape.num_key_value_heads) * shape.head_dim
    return attention + shape.hidden_size * (3 * shape.ffn_size if shape.experts is None else shape.experts.count)


def _context_seconds(plan: Plan, rates: Rates, own: float, q: int, k: int) -> float:
    """Attention's messages over context ranks, each way: queries, keys, values and outputs, or keys and values to all."""
    layout = plan.layout
    method = context_method(layout, plan.shape.num_key_value_heads)
    if method is None:
        return 0.0
    if method == "ulysses":
        return rates.all_to_all(2 * own * (2 * q + 2 * k) / layout.tensor, layout.tensor, layout.context)
    return rates.ring(2 * own * layout.context * 2 * k / layout.tensor, layout.tensor, layout.context)


def _add_tensor_messages(
    forward: Counter[str], backward: Counter[str], plan: Plan, rates: Rates, own: float, product: float
) -> None:
    """Gathers before column layers and scatters after row layers, forward in the open. Backward the gradient of each row
    layer is gathered in the open; input gathered again and gradient scattered, of each column layer, go beside its two
    products (megadpo/model/weight_gradients.py). Experts are whole and have none."""
    shape, layout = plan.shape, plan.layout
    one = rates.ring(2 * own * shape.hidden_size, 1, layout.tensor)
    num_blocks = 2 if shape.experts is None else 1
    columns = (shape.num_heads + 2 * shape.num_key_value_heads) * shape.head_dim
    columns += 2 * shape.ffn_size if shape.experts is None else 0
    beside = rates.hidden * 4 * shape.hidden_size * columns * product
    forward["tensor messages"] = 2 * num_blocks * one
    backward["tensor messages"] = num_blocks * one + max(0.0, 2 * num_blocks * one - beside)


def stage_seconds(plan: Plan, mix: Mix, rates: Rates, tokens: float) -> list[tuple[Counter[str], Counter[str]]]:
    """Each stage's forward and backward of a micro-batch, all its chunks, with what is recomputed."""
    shape, layout = plan.shape, plan.layout
    forward, backward = layer_seconds(plan, mix, rates, tokens)
    if plan.recompute == "full":
        backward = backward + forward
    elif plan.recompute == "small":
        backward = backward + Counter({"memory-bound kernels": forward["memory-bound kernels"]})
    stages = []
    for chunks in _chunks(layout, shape.num_layers):
        stages.append((_times(forward, sum(chunks)), _times(backward, sum(chunks))))
    # The head computes the logits again in the backward, before their gradient's two products.
    scored, rows = mix.scored * tokens / layout.context, shape.vocab_size / layout.tensor
    for way, products, passes in zip(stages[-1], (1, 3), (1, 2), strict=True):
        head = Counter(
            {
                "matrix products": 2 * products * scored * rows * shape.hidden_size / rates.product_rate(scored),
                "memory-bound kernels": 2 * passes * scored * rows / rates.memory,
            }
        )
        head["launches and the rest"] = rates.rest * head.total()
        head["tensor messages"] = rates.ring(2 * tokens / layout.context * shape.hidden_size, 1, layout.tensor)
        way.update(head)
    return stages


def _times(way: Counter[str], count: int) -> Counter[str]:
    return Counter({name: count * seconds for name, seconds in way.items()})


@functools.cache
def _chunks(layout: Layout, num_layers: int) -> list[list[int]]:
    """Layers of each stage's chunks."""
    sizes = [len(layers) for layers in layout.layers_of_chunks(num_layers)]
    return [sizes[stage :: layout.pipeline] for stage in range(layout.pipeline)]


def parameters(plan: Plan, stage: int) -> tuple[float, float]:
    """Of a rank of a stage: those replicated over data and context ranks, and its experts'."""
    shape, layout = plan.shape, plan.layout
    num_layers, h, experts = sum(_chunks(layout, shape.num_layers)[stage]), shape.hidden_size, shape.experts
    dense = 2 * h * (shape.num_heads + shape.num_key_value_heads) * shape.head_dim / layout.tensor + 2 * h
    dense += 2 * shape.head_dim if shape.qk_norm else 0
    dense += 3 * h * shape.ffn_size / layout.tensor if experts is None else h * experts.count
    own_experts = 0.0 if experts is None else 3 * h * experts.columns * experts.count / layout.expert / layout.expert_tensor
    vocabulary = math.ceil(shape.vocab_size / layout.tensor) * h
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    ends = vocabulary * is_first + h * is_last
    ends += vocabulary * is_last * (not (shape.tied_embeddings and is_first))
    return num_layers * dense + ends, num_layers * own_experts


def rank_gib(plan: Plan, mix: Mix, stage: int, tokens: float, num_under_way: int) -> float:
    """GiB of a rank: both models' weights, fp32 gradients, its share of masters and moments, activations, a tile of logits.

    Args:
        num_under_way: forwards of a chunk whose backward has not been (`peak_activations`).
    """
    layout, experts = plan.layout, plan.shape.experts
    dense, own_experts = parameters(plan, stage)
    whole = 6 if plan.reference == "precomputed" else 8
    weights = (whole + 12 / (layout.data * layout.context)) * dense
    if experts is not None:
        weights += (whole + 12 / _expert_replicas(layout)) * own_experts
    chunk = max(_chunks(layout, plan.shape.num_layers)[stage])
    kept = chunk * num_under_way * _layer_bytes(plan, mix, plan.recompute)
    if plan.recompute == "full":
        kept += _layer_bytes(plan, mix, "none")  # of the layer that goes backward
    tile = 80 / 48 if stage == layout.pipeline - 1 else 0.0
    return (weights + kept * tokens / layout.context / layout.tensor) / 2**30 + tile


def _layer_bytes(plan: Plan, mix: Mix, recompute: str) -> float:
    """Kept of a token in a layer, by the table of docs/parallelism.md; an expert's inputs, inner results and outputs."""
    shape = plan.shape
    h, q, k = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    if recompute == "full":
        return 2 * h
    experts, inner = shape.experts, shape.ffn_size
    routed = 0
    if experts is not None:
        inner, routed = experts.per_token * experts.columns, 2 * experts.per_token * h
    if recompute == "small":
        return 2 * (2 * h + 2 * inner + 2 * q + 2 * k + routed)
    return 2 * (4 * h + 3 * inner + 3 * q + 2 * k + 2 * mix.keys * q + routed)


def _expert_replicas(layout: Layout) -> int:
    return layout.tensor * layout.data // (layout.expert * layout.expert_tensor)


def predict(plan: Plan, mix: Mix, rates: Rates, with_bubbles: bool = True) -> Step:
    """A step of `plan`; without bubbles it is a lower bound, which is quick."""
    layout = plan.layout
    count, imbalance = packing(plan.num_pairs, layout.data, plan.capacity, layout.micro_batches_multiple_of)
    tokens = mix.pair * plan.num_pairs / layout.data / count
    ways = stage_seconds(plan, mix, rates, tokens)
    num_forwards = 1 if plan.reference == "precomputed" else 2
    seconds_by: Counter[str] = Counter()
    for forward, backward in ways:
        for name in forward | backward:
            seconds_by[name] += count * (num_forwards * forward[name] + backward[name]) / layout.pipeline
    busy = [count * (num_forwards * sum(forward.values()) + sum(backward.values())) for forward, backward in ways]
    longest = max(busy)
    if with_bubbles and layout.pipeline > 1:
        longest = _pipeline_seconds(plan, rates, ways, tokens, count, longest / count)
    seconds_by["bubbles"] = longest - sum(busy) / layout.pipeline
    seconds_by["imbalance"] += longest * (imbalance - 1)
    _add_optimizer(seconds_by, plan, rates, *(sum(way.values()) for way in ways[0]))
    under_way = _under_way(layout, count)
    gib = max(rank_gib(plan, mix, stage, tokens, under_way[stage]) for stage in range(layout.pipeline))
    mfu = _useful_flop(plan, mix) / (layout.world_size * rates.peak * seconds_by.total())
    return Step(plan, {name: each for name, each in seconds_by.items() if each > 0}, gib, count, mfu)


def _enough(layout: Layout, count: int) -> int:
    """Micro-batches after which a pipeline only repeats itself."""
    return min(count, 6 * layout.pipeline)


@functools.cache
def _under_way(layout: Layout, count: int) -> list[int]:
    return peak_activations(policy_schedule(layout.pipeline, _enough(layout, count), layout.virtual))


def _pipeline_seconds(
    plan: Plan, rates: Rates, ways: list[tuple[Counter[str], Counter[str]]], tokens: float, count: int, steady: float
) -> float:
    """Simulated from the first operation of a step to the last; of an interleaved reference, a step in the middle of a run.

    Args:
        steady: seconds that one micro-batch more takes the busiest stage.
    """
    layout, simulated = plan.layout, _enough(plan.layout, count)
    forward = tuple(sum(way.values()) / layout.virtual for way, _ in ways)
    backward = tuple(sum(way.values()) / layout.virtual for _, way in ways)
    inside = layout.tensor * layout.context * layout.data * layout.pipeline <= rates.node
    link = rates.nvlink if inside else rates.network
    message = 2 * tokens / layout.context / layout.tensor * plan.shape.hidden_size / link + rates.latency
    costs = Costs(forward, backward, forward, message=message)
    schedule = policy_schedule(layout.pipeline, simulated, layout.virtual)
    if plan.reference == "interleaved":
        policy, done = schedule, None
        for _ in range(3):
            previous: Progress | None = done
            schedule, done = with_reference(policy, previous, simulated, costs)
    elif plan.reference == "before":
        schedule = with_reference_before(schedule)
    return simulate(schedule, costs).seconds + (count - simulated) * steady


def _add_optimizer(seconds_by: Counter[str], plan: Plan, rates: Rates, forward: float, backward: float) -> None:
    """Of the first stage, which is the last to end. Gradients are summed bucket by bucket beside the last micro-batch's
    backward, parameters gathered beside the next policy forward; one bucket of each is always waited for."""
    layout = plan.layout
    dense, own_experts = parameters(plan, 0)
    places = [(dense, layout.tensor, layout.data * layout.context)]
    if own_experts:
        places.append((own_experts, layout.expert * layout.expert_tensor, _expert_replicas(layout)))
    for num_bytes, computing in ((4, backward), (2, forward)):
        whole = tail = 0.0
        for number, stride, size in places:
            whole += rates.ring(num_bytes * number, stride, size)
            tail += rates.ring(num_bytes * min(number, max(BUCKET, 1e6 * size)), stride, size)
        seconds_by["data-parallel messages"] += max(tail, whole - rates.hidden * computing)
    # AdamW, norm and clipping of a rank's share; gradients set to zero.
    moved = sum(46 * number / size + 4 * number for number, _, size in places)
    seconds_by["memory-bound kernels"] += moved / rates.memory
    seconds_by["launches and the rest"] += rates.rest * moved / rates.memory


def _useful_flop(plan: Plan, mix: Mix) -> float:
    """As benchmarks/flop.py counts them, with the queries' own width."""
    shape = plan.shape
    per_layer, experts = _dense_products(shape), shape.experts
    if experts is not None:
        per_layer += 3 * shape.hidden_size * experts.per_token * experts.columns
    each = 2 * shape.num_layers * per_layer + 2 * mix.scored * shape.hidden_size * shape.vocab_size
    each += 4 * shape.num_layers * shape.num_heads * shape.head_dim * mix.attended
    return each * mix.pair * plan.num_pairs * (3 if plan.reference == "precomputed" else 4)
