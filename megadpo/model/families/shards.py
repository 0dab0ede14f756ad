"""Where each Megatron parameter shard lies in the Hugging Face tensors.

Megatron fuses projections: ``linear_qkv`` stacks, for each query group, the group's q heads, its k and its v;
``linear_fc1`` stacks the rank's part of the gate on the rank's part of the up projection. A fused matrix is a list of
runs of logical rows; a rank's shard is an interval of that list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megadpo.model.families.common import EMBEDDING, HEAD, SCORE, ExpertPlace, ParameterShard, ShardPiece
from megadpo.model.shape import Experts, LinearAttention, ModelShape

# (logical name, first element, number of elements) along the dimension at hand.
NamedRange = tuple[str, int, int]

_GATED = ("gate_proj", "up_proj")

CORRECTION_BIAS, EXPERT_BIAS = "e_score_correction_bias", "expert_bias"
"""A router's correction bias in Hugging Face's words, and in Megatron's."""


def is_correction_bias(name: str) -> bool:
    """Whether the tensor with this Hugging Face name is a router's correction bias, which no optimizer moves."""
    return name.endswith(f".{CORRECTION_BIAS}")


def logical_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model in Hugging Face terms: embedding, layers in order, norm, head."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (shape.vocab_size, shape.hidden_size)}
    for layer in range(shape.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": size for name, size in _layer_shapes(shape, layer).items()}
    shapes["model.norm.weight"] = (shape.hidden_size,)
    if shape.head == "reward":
        shapes[SCORE] = (1, shape.hidden_size)
    elif not shape.tied_embeddings:
        shapes[HEAD] = (shape.vocab_size, shape.hidden_size)
    return shapes


def parameter_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """`logical_shapes` without what transformers' models have as buffers: routers' correction biases."""
    return {name: size for name, size in logical_shapes(shape).items() if not is_correction_bias(name)}


def _layer_shapes(shape: ModelShape, layer: int) -> dict[str, tuple[int, ...]]:
    hidden, (first, *other_norms) = shape.hidden_size, shape.norms.names
    shapes: dict[str, tuple[int, ...]] = {f"{first}.weight": (hidden,)}
    if shape.linear is not None and layer in shape.linear.layers:
        shapes |= {f"linear_attn.{name}": size for name, size in _linear_attention_shapes(shape.linear, hidden).items()}
        shapes |= {f"{name}.weight": (hidden,) for name in other_norms}
        return shapes | _mlp_shapes(shape, layer)
    shapes |= {f"self_attn.{name}.weight": size for name, size in _projections(shape).items()}
    shapes["self_attn.o_proj.weight"] = (hidden, shape.num_heads * shape.value_dim)
    shapes |= {f"{name}.weight": (hidden,) for name in other_norms}
    shapes |= _mlp_shapes(shape, layer)
    if shape.qkv_bias:
        shapes |= {f"self_attn.{name}.bias": (size,) for name, (size, _) in _projections(shape).items()}
    if shape.output_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if shape.attention_sinks:
        shapes["self_attn.sinks"] = (shape.num_heads,)
    for name, size in _latent_norms(shape).items():
        shapes[f"self_attn.{name}.weight"] = (size,)
    for name, heads in (("q_norm", shape.num_heads), ("k_norm", shape.num_key_value_heads)):
        if shape.qk_norm is not None:
            whole = (heads * shape.head_dim,)
            sizes = {"head": (shape.head_dim,), "heads": (heads, shape.head_dim), "projection": whole}
            shapes[f"self_attn.{name}.weight"] = sizes[shape.qk_norm]
    return shapes


def _linear_attention_shapes(linear: LinearAttention, hidden: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer's linear attention."""
    columns, gates, heads = linear.num_convolved, linear.num_outputs, linear.num_value_heads
    return {
        "dt_bias": (heads,),
        "A_log": (heads,),
        "conv1d.weight": (columns, 1, linear.kernel_size),
        "in_proj_qkvz.weight": (columns + gates, hidden),
        "in_proj_ba.weight": (2 * heads, hidden),
        "norm.weight": (linear.value_dim,),
        "out_proj.weight": (hidden, gates),
    }


def _projections(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """The matrices that queries, keys and values come from."""
    query, key, hidden = shape.num_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim, shape.hidden_size
    latents = shape.latents
    if shape.attention_gate:  # behind each head's query, its gate
        return {"q_proj": (2 * query, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden)}
    if latents is not None:
        rank, of_keys = latents.query_rank, latents.key_value_rank
        queries = {"q_proj": (query, hidden)}
        if rank is not None:
            queries = {"q_a_proj": (rank, hidden), "q_b_proj": (query, rank)}
        return queries | {
            "kv_a_proj_with_mqa": (of_keys + latents.rope_dim, hidden),
            "kv_b_proj": (shape.num_heads * (latents.plain_dim + latents.value_dim), of_keys),
        }
    if shape.fuses_qkv:
        return {"qkv_proj": (query + 2 * key, hidden)}
    return {"q_proj": (query, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden)}


def _latent_norms(shape: ModelShape) -> dict[str, int]:
    """The norms of latents, by their names, and their columns."""
    if shape.latents is None:
        return {}
    of_queries = {} if shape.latents.query_rank is None else {"q_a_layernorm": shape.latents.query_rank}
    return of_queries | {"kv_a_layernorm": shape.latents.key_value_rank}


def _mlp_shapes(shape: ModelShape, layer: int) -> dict[str, tuple[int, ...]]:
    experts, hidden = shape.experts, shape.hidden_size
    if experts is None or layer not in experts.layers:
        inner = {"gate_up_proj": 2 * shape.ffn_size} if shape.fuses_gate_up else dict.fromkeys(_GATED, shape.ffn_size)
        block = shape.mlp_block
        shapes: dict[str, tuple[int, ...]] = {f"{block}.{name}.weight": (size, hidden) for name, size in inner.items()}
        shapes[f"{block}.down_proj.weight"] = (hidden, shape.ffn_size)
        if shape.mlp_bias:
            shapes |= {f"{block}.{name}.bias": (size,) for name, size in {**inner, "down_proj": hidden}.items()}
        return shapes
    shapes = {f"{experts.block}.{experts.router}.weight": (experts.count, hidden)}
    if experts.has_biases:
        shapes[f"{experts.block}.{experts.router}.bias"] = (experts.count,)
    if experts.routing.has_correction_bias:
        shapes[f"{experts.block}.{experts.router}.{CORRECTION_BIAS}"] = (experts.count,)
    shapes |= _shared_expert_shapes(experts, hidden)
    for number in range(experts.count):
        for name, rows, columns in (
            (experts.gate, experts.columns, hidden),
            (experts.up, experts.columns, hidden),
            (experts.down, hidden, experts.columns),
        ):
            matrix = f"{experts.block}.experts.{number}.{name}"
            shapes[f"{matrix}.weight"] = (rows, columns)
            if experts.has_biases:
                shapes[f"{matrix}.bias"] = (rows,)
    return shapes


def _shared_expert_shapes(experts: Experts, hidden: int) -> dict[str, tuple[int, ...]]:
    if experts.shared is None:
        return {}
    name, columns = f"{experts.block}.{experts.shared.name}", experts.shared.columns
    shapes: dict[str, tuple[int, ...]] = {f"{name}.{matrix}.weight": (columns, hidden) for matrix in _GATED}
    shapes[f"{name}.down_proj.weight"] = (hidden, columns)
    if experts.shared.has_gate:
        shapes[f"{name}_gate.weight"] = (1, hidden)
    return shapes


def shard_parameters(
    shape: ModelShape,
    *,
    tensor_rank: int,
    num_tensor: int,
    layers: range,
    has_embedding: bool,
    has_head: bool,
    expert_place: ExpertPlace | None = None,
) -> list[ParameterShard]:
    """What a rank of a pipeline stage holds, in Megatron's names (local layer spec) with global layer numbers.

    The vocabulary is padded to a multiple of `num_tensor`. A tied model's stage with both ends has one matrix
    (``embedding.word_embeddings.weight``); a last stage alone has its own copy of the embedding as its head. The scalar
    head of a reward model is whole on every rank.

    Args:
        tensor_rank: this rank among the `num_tensor` ranks that share each matrix.
        layers: global numbers of the stage's layers.
        has_embedding: the stage is the first.
        has_head: the stage is the last.
        expert_place: this rank among those that share the experts; None: each expert is cut over the tensor ranks.
    """
    cut = _Cutter(tensor_rank, num_tensor)
    shards: list[ParameterShard] = []
    padded_vocab = -(-shape.vocab_size // num_tensor) * num_tensor
    if has_embedding:
        shards.append(
            cut.rows("embedding.word_embeddings.weight", [(EMBEDDING, 0, shape.vocab_size)], padded_vocab, shape.hidden_size)
        )
    for layer in layers:
        shards.extend(_layer_shards(shape, cut, layer))
        if shape.experts is not None and layer in shape.experts.layers:
            place = expert_place or ExpertPlace(tensor=tensor_rank, num_tensor=num_tensor)
            shards.extend(_mixture_shards(shape, shape.experts, cut, place, layer))
        else:
            shards.extend(_mlp_shards(shape, cut, layer))
    if has_head:
        shards.append(cut.whole("decoder.final_layernorm.weight", "model.norm.weight", shape.hidden_size))
        if shape.head == "reward":
            shards.append(cut.whole("output_layer.weight", SCORE, 1, shape.hidden_size))
        elif not (shape.tied_embeddings and has_embedding):
            runs = [(EMBEDDING if shape.tied_embeddings else HEAD, 0, shape.vocab_size)]
            head = cut.rows("output_layer.weight", runs, padded_vocab, shape.hidden_size)
            shards.append(replace(head, is_primary=not shape.tied_embeddings))
    return shards


@dataclass(frozen=True)
class _Cutter:
    """Makes one tensor rank's shards."""

    rank: int
    num_ranks: int

    def _share(self, size: int) -> int:
        assert size % self.num_ranks == 0, (size, self.num_ranks)
        return size // self.num_ranks

    def rows(self, name: str, runs: list[NamedRange], num_rows: int, *other: int) -> ParameterShard:
        """This rank's rows of the matrix (or vector) that `runs` stack up to."""
        share = self._share(num_rows)
        pieces = _interval(runs, self.rank * share, share)
        return ParameterShard(name, (share, *other), 0, tuple(pieces))

    def columns(self, name: str, logical_name: str, num_rows: int, num_columns: int) -> ParameterShard:
        share = self._share(num_columns)
        piece = ShardPiece(logical_name, 1, self.rank * share, 0, share)
        return ParameterShard(name, (num_rows, share), 1, (piece,))

    def gated(self, name: str, gate: tuple[str, int], up: tuple[str, int], num_rows: int, *other: int) -> ParameterShard:
        """This rank's rows of `gate`, then its rows of `up`, each given by the tensor and the first of its `num_rows`."""
        share = self._share(num_rows)
        (gate_name, gate_first), (up_name, up_first), start = gate, up, self.rank * share
        pieces = (
            ShardPiece(gate_name, 0, gate_first + start, 0, share),
            ShardPiece(up_name, 0, up_first + start, share, share),
        )
        return ParameterShard(name, (2 * share, *other), 0, pieces)

    def whole(self, name: str, logical_name: str, *shape: int) -> ParameterShard:
        piece = ShardPiece(logical_name, 0, 0, 0, shape[0])
        return ParameterShard(name, shape, None, (piece,), is_primary=self.rank == 0)


def _interval(runs: list[NamedRange], start: int, length: int) -> Iterator[ShardPiece]:
    """Pieces of elements ``[start, start + length)`` of the stacked runs."""
    position = 0
    for name, first, count in runs:
        low, high = max(start, position), min(start + length, position + count)
        if low < high:
            yield ShardPiece(name, 0, first + low - position, low - start, high - low)
        position += count


def _layer_shards(shape: ModelShape, cut: _Cutter, layer: int) -> list[ParameterShard]:
    to, of, norms = f"decoder.layers.{layer}", f"model.layers.{layer}", shape.norms
    attention, hf_attention = f"{to}.self_attention", f"{of}.self_attn"
    num_qkv = (shape.num_heads * (2 if shape.attention_gate else 1) + 2 * shape.num_key_value_heads) * shape.head_dim
    shards = [
        cut.whole(f"{to}.{megatron_name}.weight", f"{of}.{name}.weight", shape.hidden_size)
        for megatron_name, name in (
            ("input_layernorm", norms.before_attention),
            ("post_self_attn_layernorm", norms.after_attention),
            ("pre_mlp_layernorm", norms.before_mlp),
            ("post_mlp_layernorm", norms.after_mlp),
        )
        if name is not None
    ]
    if shape.linear is not None and layer in shape.linear.layers:
        return shards + _linear_attention_shards(shape.linear, cut, attention, f"{of}.linear_attn", shape.hidden_size)
    num_outputs = shape.num_heads * shape.value_dim
    shards.append(
        cut.columns(f"{attention}.linear_proj.weight", f"{hf_attention}.o_proj.weight", shape.hidden_size, num_outputs)
    )
    if shape.latents is not None:
        return shards + _latent_shards(shape, cut, attention, hf_attention)
    shards.append(
        cut.rows(f"{attention}.linear_qkv.weight", _qkv_runs(shape, hf_attention, "weight"), num_qkv, shape.hidden_size)
    )
    if shape.qkv_bias:
        shards.append(cut.rows(f"{attention}.linear_qkv.bias", _qkv_runs(shape, hf_attention, "bias"), num_qkv))
    if shape.output_bias:
        shards.append(cut.whole(f"{attention}.linear_proj.bias", f"{hf_attention}.o_proj.bias", shape.hidden_size))
    if shape.attention_sinks:
        sinks = [(f"{hf_attention}.sinks", 0, shape.num_heads)]
        shards.append(cut.rows(f"{attention}.core_attention.softmax_offset", sinks, shape.num_heads))
    return shards + _query_key_norm_shards(shape, cut, attention, hf_attention)


_OF_LATENTS = {
    "q_proj": "linear_q_proj",
    "q_a_proj": "linear_q_down_proj",
    "q_a_layernorm": "q_layernorm",
    "q_b_proj": "linear_q_up_proj",
    "kv_a_proj_with_mqa": "linear_kv_down_proj",
    "kv_a_layernorm": "kv_layernorm",
    "kv_b_proj": "linear_kv_up_proj",
}
"""Names in the files, and Megatron's, of what multi-head latent attention has before its core."""


def _latent_shards(shape: ModelShape, cut: _Cutter, attention: str, hf_attention: str) -> list[ParameterShard]:
    shards = [
        cut.rows(f"{attention}.{_OF_LATENTS[name]}.weight", [(f"{hf_attention}.{name}.weight", 0, rows)], rows, columns)
        for name, (rows, columns) in _projections(shape).items()
    ]
    return shards + [
        cut.whole(f"{attention}.{_OF_LATENTS[name]}.weight", f"{hf_attention}.{name}.weight", size)
        for name, size in _latent_norms(shape).items()
    ]


def _linear_attention_shards(
    linear: LinearAttention, cut: _Cutter, attention: str, of: str, hidden: int
) -> list[ParameterShard]:
    """Key heads, with the value heads that read them, are spread over the tensor ranks."""
    columns, heads = linear.num_convolved, linear.num_value_heads
    # The files have all heads' queries, then keys, then values; a rank has its heads' of each.
    queries = linear.num_key_heads * linear.key_dim
    kinds = [(0, queries), (queries, queries), (2 * queries, linear.num_outputs)]
    pieces, start = [], 0
    for first, number in kinds:
        share = number // cut.num_ranks
        pieces.append(ShardPiece(f"{of}.conv1d.weight", 0, first + cut.rank * share, start, share))
        start += share
    convolution = (columns // cut.num_ranks, 1, linear.kernel_size)
    return [
        cut.rows(f"{attention}.linear_in.weight", _linear_input_runs(linear, of), linear.num_inputs, hidden),
        ParameterShard(f"{attention}.conv1d.weight", convolution, 0, tuple(pieces)),
        cut.rows(f"{attention}.A_log", [(f"{of}.A_log", 0, heads)], heads),
        cut.rows(f"{attention}.dt_bias", [(f"{of}.dt_bias", 0, heads)], heads),
        cut.whole(f"{attention}.norm.weight", f"{of}.norm.weight", linear.value_dim),
        cut.columns(f"{attention}.linear_proj.weight", f"{of}.out_proj.weight", hidden, linear.num_outputs),
    ]


def _linear_input_runs(linear: LinearAttention, of: str) -> list[NamedRange]:
    """For each key head its query, key, values and gates, then their rates and decays."""
    ratio = linear.num_value_heads // linear.num_key_heads
    sizes = {"in_proj_qkvz": 2 * linear.key_dim + 2 * ratio * linear.value_dim, "in_proj_ba": 2 * ratio}
    heads = range(linear.num_key_heads)
    return [(f"{of}.{name}.weight", head * size, size) for head in heads for name, size in sizes.items()]


def _query_key_norm_shards(shape: ModelShape, cut: _Cutter, attention: str, hf_attention: str) -> list[ParameterShard]:
    shards = []
    for norm, heads in (("q", shape.num_heads), ("k", shape.num_key_value_heads)):
        name, hf_name = f"{attention}.{norm}_layernorm.weight", f"{hf_attention}.{norm}_norm.weight"
        if shape.qk_norm == "head":
            shards.append(cut.whole(name, hf_name, shape.head_dim))
        elif shape.qk_norm == "heads":
            shards.append(cut.rows(name, [(hf_name, 0, heads)], heads, shape.head_dim))
        elif shape.qk_norm == "projection":
            shards.append(cut.rows(name, [(hf_name, 0, heads * shape.head_dim)], heads * shape.head_dim))
    return shards


def _mlp_shards(shape: ModelShape, cut: _Cutter, layer: int) -> list[ParameterShard]:
    to, of = f"decoder.layers.{layer}.mlp", f"model.layers.{layer}.{shape.mlp_block}"
    shards = [cut.columns(f"{to}.linear_fc2.weight", f"{of}.down_proj.weight", shape.hidden_size, shape.ffn_size)]
    for kind, other in (("weight", (shape.hidden_size,)), *([("bias", ())] if shape.mlp_bias else [])):
        gate, up = ((f"{of}.{name}.{kind}", 0) for name in _GATED)
        if shape.fuses_gate_up:
            gate, up = ((f"{of}.gate_up_proj.{kind}", first) for first in (0, shape.ffn_size))
        shards.append(cut.gated(f"{to}.linear_fc1.{kind}", gate, up, shape.ffn_size, *other))
    if shape.mlp_bias:
        shards.append(cut.whole(f"{to}.linear_fc2.bias", f"{of}.down_proj.bias", shape.hidden_size))
    return shards


def _mixture_shards(
    shape: ModelShape, experts: Experts, cut: _Cutter, place: ExpertPlace, layer: int
) -> list[ParameterShard]:
    """The router, and this rank's experts under their numbers in the whole layer."""
    to, of = f"decoder.layers.{layer}.mlp", f"model.layers.{layer}.{experts.block}"
    hidden, router = shape.hidden_size, f"{of}.{experts.router}"
    shards = [cut.whole(f"{to}.router.weight", f"{router}.weight", experts.count, hidden)]
    if experts.has_biases:
        shards.append(cut.whole(f"{to}.router.bias", f"{router}.bias", experts.count))
    if experts.routing.has_correction_bias:
        shards.append(cut.whole(f"{to}.router.{EXPERT_BIAS}", f"{router}.{CORRECTION_BIAS}", experts.count))
    shards += _shared_expert_shards(experts, cut, to, of, hidden)
    within, count = _Cutter(place.tensor, place.num_tensor), experts.count // place.num_expert
    for number in range(place.expert * count, (place.expert + 1) * count):
        local, expert = f"{to}.experts.local_experts.{number}", f"{of}.experts.{number}"
        down = f"{expert}.{experts.down}"
        for kind, other in (("weight", (hidden,)), *([("bias", ())] if experts.has_biases else [])):
            gate, up = ((f"{expert}.{name}.{kind}", 0) for name in (experts.gate, experts.up))
            shards.append(within.gated(f"{local}.linear_fc1.{kind}", gate, up, experts.columns, *other))
        shards.append(within.columns(f"{local}.linear_fc2.weight", f"{down}.weight", hidden, experts.columns))
        if experts.has_biases:
            shards.append(within.whole(f"{local}.linear_fc2.bias", f"{down}.bias", hidden))
    return shards


def _shared_expert_shards(experts: Experts, cut: _Cutter, to: str, of: str, hidden: int) -> list[ParameterShard]:
    """It is cut as a dense layer's MLP is, not as experts are."""
    if experts.shared is None:
        return []
    to, of, columns = f"{to}.shared_experts", f"{of}.{experts.shared.name}", experts.shared.columns
    gate, up = ((f"{of}.{name}.weight", 0) for name in _GATED)
    shards = [
        cut.gated(f"{to}.linear_fc1.weight", gate, up, columns, hidden),
        cut.columns(f"{to}.linear_fc2.weight", f"{of}.down_proj.weight", hidden, columns),
    ]
    if experts.shared.has_gate:
        shards.append(cut.whole(f"{to}.gate_weight", f"{of}_gate.weight", 1, hidden))
    return shards


def _qkv_runs(shape: ModelShape, attention: str, kind: str) -> list[NamedRange]:
    head = shape.head_dim
    heads = shape.num_heads // shape.num_key_value_heads * head
    places = [(f"{attention}.{name}_proj.{kind}", 0) for name in "qkv"]
    if shape.fuses_qkv:
        query, key = shape.num_heads * head, shape.num_key_value_heads * head
        places = [(f"{attention}.qkv_proj.{kind}", first) for first in (0, query, query + key)]
    (query_name, query_first), *others = places
    runs = []
    for group in range(shape.num_key_value_heads):
        if shape.attention_gate:  # the queries of a group's heads, then the gates
            of_group = range(2 * group * heads, 2 * (group + 1) * heads, 2 * head)
            runs += [(query_name, first + of_gate, head) for of_gate in (0, head) for first in of_group]
        else:
            runs.append((query_name, query_first + group * heads, heads))
        runs += [(name, first + group * head, head) for name, first in others]
    return runs


def names_in(shard: ParameterShard) -> list[str]:
    """Hugging Face names of the tensors that the shard has a part of, be it the padding of a vocabulary."""
    if shard.pieces:
        return list(dict.fromkeys(piece.logical_name for piece in shard.pieces))
    return [EMBEDDING if shard.name.startswith("embedding") or not shard.is_primary else HEAD]
