"""Seconds of a step, reckoned from rates: computing, messages, a pipeline's bubbles (simulated), imbalance, the optimizer.

Every sum says what it counts. What a rate stands for, and where it comes from, is said once, in hardware.py. Sizes: h
hidden, q and k a token's queries and keys, f the MLP's inner size (of experts, those that a token goes to together).
"""

from __future__ import annotations

from dataclasses import dataclass

from megadpo.model.flop import (
    attention_width,
    body_parameters,
    forward_flop,
    head_parameters,
    linear_attention_flop,
    training_flop,
)
from megadpo.model.shape import ModelShape
from megadpo.parallel.layout import context_method
from megadpo.pipeline.fill import Progress, with_reference, with_reference_before
from megadpo.pipeline.simulate import Costs, simulate
from megadpo.planning.hardware import Rates
from megadpo.planning.memory import FULL_GRADIENT_BUCKET, RankMemory, moved_bytes, rank_memory
from megadpo.planning.plan import Plan, adapter_work, chunk_layers, expert_replicas, low_rank_numbers, parameters, trained
from megadpo.planning.sums import Sums
from megadpo.planning.workload import MicroBatches, Mix, Workload

PRODUCTS, KERNELS, REST = "matrix products", "memory-bound kernels", "launches and the rest"
BUBBLES, IMBALANCE = "bubbles", "imbalance"


@dataclass(frozen=True)
class Step:
    """A predicted step: its seconds by what they go to, and the memory of the fullest rank."""

    plan: Plan
    seconds_by: dict[str, float]
    memory: RankMemory
    micro_batches: MicroBatches
    mfu: float

    @property
    def seconds(self) -> float:
        return sum(self.seconds_by.values())

    @property
    def gib(self) -> float:
        return self.memory.peak / 2**30

    @property
    def num_micro_batches(self) -> int:
        return self.micro_batches.count

    def bounds(self) -> list[tuple[str, float]]:
        """What the step's time goes to, with its share, largest first."""
        most = sorted(self.seconds_by.items(), key=lambda item: -item[1])
        return [(name, each / self.seconds) for name, each in most]


def layer_seconds(plan: Plan, mix: Mix, rates: Rates, tokens: float) -> tuple[Sums, Sums]:
    """A layer's forward and backward of a micro-batch of `tokens`, by what they go to.

    Each operation reads its inputs and writes its results once, as in benchmarks/results.md. Under sequence parallelism a
    tensor rank has its share of all of them. A frozen weight's gradient is no product.
    """
    shape, layout, w = plan.shape, plan.layout, plan.number_bytes
    of_softmax = shape.num_softmax_layers / shape.num_layers  # q and k are those of a mean layer, of which some have none
    h, q = shape.hidden_size, of_softmax * shape.num_heads * shape.head_dim
    k = of_softmax * shape.num_key_value_heads * shape.head_dim
    experts, tensor = shape.experts, layout.tensor
    inner = shape.ffn_size if experts is None else experts.columns_of_token
    own = tokens / layout.context
    product, copied = own / tensor / rates.product_rate(own), w * own / tensor / rates.memory
    products: float = dense_products(shape) * product
    busiest = 0.0
    head_norms = q + k if shape.qk_norm or shape.norms_turned else 0
    moved: float = 4 * h + 2 * head_norms + 2 * (q + k) + 3 * inner + 6 * h  # norms, rope, SwiGLU, residual adds
    moved += 2 * k + 2 * mix.keys * q + 2 * (q + k)  # keys gathered and repeated for their readers; strided copies
    moved_back = 6 * h + 3 * head_norms + 2 * (q + k) + 5 * inner + 6 * h + 2 * mix.keys * q + 2 * k + 2 * q + 6 * k
    num_launches = 26.0
    if shape.attention_gate:
        moved, moved_back = moved + 3 * q, moved_back + 5 * q
    if shape.linear is not None:  # convolution and SiLU, copies of what goes into the rule, the gated norm
        columns = (1 - of_softmax) * (6 * shape.linear.num_convolved + 4 * shape.linear.num_outputs)
        moved, moved_back = moved + columns, moved_back + 2 * columns
    if experts is not None:
        routed = 6 * experts.per_token * h  # sorted by expert here and there, and back
        moved, moved_back = moved + routed, moved_back + routed
        num_launches += 8 * experts.count / layout.expert
        routed_rows = own / tensor * experts.per_token * layout.expert / experts.count
        routed_columns = experts.per_token * experts.columns
        expert_products = 3 * h * routed_columns * own / tensor / rates.product_rate(routed_rows)
        products += expert_products
        busiest = (rates.expert_imbalance - 1) * expert_products if layout.expert > 1 else 0.0
    low_rank, of_experts, _ = low_rank_numbers(plan)
    if experts is not None:  # a token meets those of its experts
        low_rank += of_experts * layout.expert * experts.per_token / experts.count / tensor
    adapters = low_rank * own / rates.product_rate(own)
    attention = (4 * q * mix.attended + linear_attention_flop(shape) / shape.num_layers) / tensor * own / rates.attention
    forward = Sums({PRODUCTS: 2 * (products + adapters), "attention": attention, KERNELS: moved * copied})
    back = 4 if plan.adapter is None else 2
    backward = Sums({PRODUCTS: back * products + 4 * adapters, "attention": 2 * attention, KERNELS: moved_back * copied})
    for way, times in ((forward, 1), (backward, 2)):
        way[REST] = _rest(way, rates, times * num_launches)
        if experts is not None:
            way[IMBALANCE] = times * 2 * busiest
            way["expert messages"] = 2 * rates.all_to_all(w * own / tensor * experts.per_token * h, 1, layout.expert)
        way["context messages"] = _context_seconds(plan, rates, own, q, k)
    _add_tensor_messages(forward, backward, plan, rates, own, product)
    return forward, backward


def _rest(way: Sums, rates: Rates, num_launches: float) -> float:
    """Kernels that have no name here, and what the host needs to launch all if that is longer."""
    named = sum(way.values())
    return max(rates.rest * named, num_launches * rates.launch - named)


def dense_products(shape: ModelShape) -> float:
    """Weights of a mean layer that a token is multiplied with, but those of the experts that it is sent to."""
    experts = shape.experts
    return shape.attention_parameters / shape.num_layers + shape.hidden_size * (
        3 * shape.ffn_size if experts is None else 3 * experts.shared_columns + experts.count
    )


def _context_seconds(plan: Plan, rates: Rates, own: float, q: float, k: float) -> float:
    """Attention's messages over context ranks, each way: queries, keys, values and outputs, or keys and values to all."""
    layout, w = plan.layout, plan.number_bytes
    method = context_method(layout, plan.shape.num_key_value_heads)
    if method is None:
        return 0.0
    if method == "ulysses":
        return rates.all_to_all(w * own * (2 * q + 2 * k) / layout.tensor, layout.tensor, layout.context)
    return rates.ring(w * own * layout.context * 2 * k / layout.tensor, layout.tensor, layout.context)


def _add_tensor_messages(forward: Sums, backward: Sums, plan: Plan, rates: Rates, own: float, product: float) -> None:
    """Gathers before column layers and scatters after row layers, forward in the open. Backward the gradient of each row
    layer is gathered in the open; input gathered again and gradient scattered, of each column layer, go beside its two
    products (megadpo/model/weight_gradients.py). Experts are whole and have none."""
    shape, layout = plan.shape, plan.layout
    one = rates.ring(plan.number_bytes * own * shape.hidden_size, 1, layout.tensor)
    inner = shape.ffn_size if shape.experts is None else shape.experts.shared_columns
    num_blocks = 2 if inner else 1
    row = shape.num_softmax_layers * shape.num_heads * shape.value_dim
    row += 0 if shape.linear is None else len(shape.linear_layers) * shape.linear.num_outputs
    weights = (shape.attention_parameters - shape.hidden_size * row) / shape.num_layers
    weights += 2 * shape.hidden_size * inner
    beside = rates.hidden * 4 * weights * product
    forward["tensor messages"] = 2 * num_blocks * one
    backward["tensor messages"] = num_blocks * one + max(0.0, 2 * num_blocks * one - beside)


def stage_seconds(plan: Plan, mix: Mix, rates: Rates, tokens: float) -> list[tuple[Sums, Sums]]:
    """Each stage's forward and backward of a micro-batch, all its chunks, with what is recomputed, gathered or moved."""
    shape, layout = plan.shape, plan.layout
    forward, backward = layer_seconds(plan, mix, rates, tokens)
    if plan.recompute == "full":
        again = 1.0 if plan.block_layers is None else _share_again(plan)
        backward = backward.plus(forward.times(again))
    elif plan.recompute == "selective":
        backward = backward.plus({"attention": forward["attention"]})
    elif plan.recompute == "small":
        backward = backward.plus({KERNELS: forward[KERNELS]})
    stages = []
    for stage, chunks in enumerate(chunk_layers(layout, shape.num_layers)):
        stages.append((forward.times(sum(chunks)), backward.times(sum(chunks))))
        if plan.engine == "deepspeed" and plan.zero_stage == 3:
            gathered = plan.number_bytes * sum(parameters(plan, stage))
            for way in stages[-1]:
                link = rates.ring(gathered, layout.tensor, plan.replicas)
                way["data-parallel messages"] += max(0.0, link - rates.hidden * sum(way.values()))
                if plan.offload != "none":
                    way["host memory"] += gathered / plan.replicas / rates.host
        if plan.activation_offload != "none":
            moved = moved_bytes(plan, mix, stage, tokens / layout.context) / rates.host
            for way in stages[-1]:  # away in the forward of the policy alone, so that both ways count as the backward's
                stages[-1][1]["host memory"] += max(0.0, moved - rates.hidden * (sum(way.values()) - way["host memory"]))
    if shape.head == "logprobs":
        _add_head(stages[-1], plan, mix, rates, tokens)
    return stages


def _share_again(plan: Plan) -> float:
    chunk = max(max(chunks) for chunks in chunk_layers(plan.layout, plan.shape.num_layers))
    return min(1.0, (plan.block_layers or 0) / chunk)


def _add_head(last: tuple[Sums, Sums], plan: Plan, mix: Mix, rates: Rates, tokens: float) -> None:
    """The head computes the logits again in the backward, before their gradient's two products."""
    shape, layout, w = plan.shape, plan.layout, plan.number_bytes
    scored, rows = mix.scored * tokens / layout.context, shape.vocab_size / layout.tensor
    adapter = adapter_work(plan)
    back = 3 if adapter is None or adapter.has_whole_head else 2
    low_rank = 0.0 if adapter is None else adapter.head / layout.tensor
    added = 1 if low_rank else 0  # to each tile
    for way, products, of_adapter, passes in zip(last, (1, back), (1, 3), (1 + added, 2 + added), strict=True):
        work = products * rows * shape.hidden_size + of_adapter * low_rank
        head = Sums(
            {
                PRODUCTS: 2 * work * scored / rates.product_rate(scored),
                KERNELS: w * passes * scored * rows / rates.memory,
            }
        )
        head[REST] = rates.rest * head.total()
        head["tensor messages"] = rates.ring(w * tokens / layout.context * shape.hidden_size, 1, layout.tensor)
        way.add(head)


def fullest_rank(plan: Plan, workload: Workload, micro_batches: MicroBatches) -> RankMemory:
    """Of the stage whose ranks hold most."""
    stages = range(plan.layout.pipeline)
    if plan.layout.pipeline > 4:  # those between are alike but for their layers, of which the second has most
        stages = [0, 1, plan.layout.pipeline // 2, plan.layout.pipeline - 1]  # type: ignore[assignment]
    return max((rank_memory(plan, workload.mix, micro_batches, stage) for stage in stages), key=lambda one: one.peak)


def predict(plan: Plan, workload: Workload, rates: Rates, with_bubbles: bool = True) -> Step:
    """A step of `plan`; without bubbles but those of the first and the last micro-batch it is a lower bound, which is quick.

    Raises:
        UserError: a group is longer than a micro-batch.
    """
    layout, mix = plan.layout, workload.mix
    found = workload.packed(plan.num_pairs, layout.data, plan.capacity, layout.micro_batches_multiple_of)
    tokens, count = mix.pair * plan.num_pairs / layout.data / found.count, found.count
    ways = stage_seconds(plan, mix, rates, tokens)
    seconds_by = Sums()
    for forward, backward in ways:
        for name in forward | backward:
            seconds_by[name] += count * (plan.num_forwards * forward[name] + backward[name]) / layout.pipeline
    busy = [count * (plan.num_forwards * sum(forward.values()) + sum(backward.values())) for forward, backward in ways]
    longest = max(busy)
    if layout.pipeline > 1:
        longest = (
            _pipeline_seconds(plan, rates, ways, tokens, count, longest / count)
            if with_bubbles
            else _least_pipeline_seconds(plan, ways, busy)
        )
    seconds_by[BUBBLES] = longest - sum(busy) / layout.pipeline
    seconds_by[IMBALANCE] += longest * (found.imbalance - 1)
    _add_optimizer(seconds_by, plan, rates, *(sum(way.values()) for way in ways[0]))
    memory = fullest_rank(plan, workload, found)
    mfu = _useful_flop(plan, mix) / (layout.world_size * rates.peak * seconds_by.total())
    return Step(plan, {name: each for name, each in seconds_by.items() if each > 0}, memory, found, mfu)


def _least_pipeline_seconds(plan: Plan, ways: list[tuple[Sums, Sums]], busy: list[float]) -> float:
    """What the pipeline takes at least: a stage's own work, after the first forward has come to it through the stages before
    it, and before its last backward has gone back through them. An interleaved reference and separate weight gradients
    fill these times: there it is the busiest stage's own work."""
    if plan.zero_bubble or plan.reference == "interleaved":
        return max(busy)
    at_once = plan.layout.virtual * (2 if plan.split_pairs else 1)
    before, longest = 0.0, 0.0
    for (forward, backward), own in zip(ways, busy, strict=True):
        longest = max(longest, before + own)
        before += (sum(forward.values()) + sum(backward.values())) / at_once
    return longest


def _pipeline_seconds(
    plan: Plan, rates: Rates, ways: list[tuple[Sums, Sums]], tokens: float, count: int, steady: float
) -> float:
    """Simulated from the first operation of a step to the last; of an interleaved reference, a step in the middle of a run.

    Args:
        steady: seconds that one micro-batch more takes the busiest stage.
    """
    layout, schedule = plan.layout, plan.schedule(count)
    simulated = schedule.num_micro_batches
    forward = tuple(sum(way.values()) / layout.virtual for way, _ in ways)
    backward = tuple(sum(way.values()) / layout.virtual for _, way in ways)
    inside = layout.world_size <= rates.node
    link = rates.nvlink if inside else rates.network
    message = plan.number_bytes * tokens / layout.context / layout.tensor * plan.shape.hidden_size / link + rates.latency
    costs = Costs(forward, backward, forward, message=message)
    if plan.split_pairs:
        costs = costs.in_halves()
    if plan.zero_bubble:
        costs = costs.with_separate_weight_gradients()
    if plan.reference == "interleaved":
        policy, done = schedule, None
        for _ in range(3):
            previous: Progress | None = done
            schedule, done = with_reference(policy, previous, simulated, costs)
    elif plan.num_forwards > 1:
        schedule = with_reference_before(schedule)
    return simulate(schedule, costs).seconds + (count - simulated) * steady


def _add_optimizer(seconds_by: Sums, plan: Plan, rates: Rates, forward: float, backward: float) -> None:
    """Of the first stage, which is the last to end. Gradients are summed bucket by bucket beside the last micro-batch's
    backward, parameters gathered beside the next policy forward; one bucket of each is always waited for."""
    layout = plan.layout
    dense, own_experts = trained(plan, 0)
    places = [(dense, layout.tensor, plan.replicas)]
    if own_experts:
        places.append((own_experts, layout.expert * layout.expert_tensor, expert_replicas(layout)))
    zero_3 = plan.engine == "deepspeed" and plan.zero_stage == 3
    gradient = plan.gradient_bytes if plan.engine == "megatron" else 4
    for num_bytes, computing in ((gradient, backward), (0 if zero_3 else plan.number_bytes, forward)):
        whole = tail = 0.0
        for number, stride, size in places:
            whole += rates.ring(num_bytes * number, stride, size)
            tail += rates.ring(num_bytes * min(number, max(FULL_GRADIENT_BUCKET, 1e6 * size)), stride, size)
        hidden = rates.hidden * computing if plan.overlap else 0.0
        seconds_by["data-parallel messages"] += max(tail, whole - hidden)
    # AdamW, norm and clipping of a rank's share; gradients set to zero.
    moved = sum(46 * number / size + 4 * number for number, _, size in places)
    seconds_by[KERNELS] += moved / rates.memory
    seconds_by[REST] += rates.rest * moved / rates.memory
    if plan.offload != "none":
        each_way = 8 if plan.engine == "megatron" else 8 + plan.number_bytes
        seconds_by["host memory"] += sum(each_way * number / size for number, _, size in places) / rates.host


def _useful_flop(plan: Plan, mix: Mix) -> float:
    """As megadpo/model/flop.py counts them, but of mean lengths, and every layer attending without a window."""
    shape, tokens = plan.shape, mix.pair * plan.num_pairs
    scored, width = mix.scored * tokens, shape.num_softmax_layers * attention_width(shape)
    attention = forward_flop(0, 0, mix.attended * tokens, 0, 0, width) + tokens * linear_attention_flop(shape)
    forward = forward_flop(tokens, scored, 0, body_parameters(shape), head_parameters(shape), 0) + attention
    return training_flop(shape, tokens, scored, attention, adapter_work(plan)) + (plan.num_forwards - 1) * forward
