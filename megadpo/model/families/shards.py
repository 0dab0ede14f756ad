"""Where each Megatron parameter shard lies in the Hugging Face tensors.

Megatron fuses projections: ``linear_qkv`` stacks, for each query group, the group's q heads, its k and its v;
``linear_fc1`` stacks the rank's part of the gate on the rank's part of the up projection. A fused matrix is a list of
runs of logical rows; a rank's shard is an interval of that list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megadpo.model.families.common import EMBEDDING, HEAD, SCORE, Experts, ParameterShard, Piece, Place
from megadpo.model.families.heads import Head, head_of
from megadpo.model.families.registry import as_config, family_of

# (logical name, first element, number of elements) along the dimension at hand.
Run = tuple[str, int, int]


@dataclass(frozen=True)
class _Sizes:
    hidden: int
    intermediate: int
    num_heads: int
    num_groups: int
    head_dim: int
    vocab: int
    qkv_bias: bool
    qk_norm: bool
    tied: bool
    head: Head
    experts: Experts | None

    @staticmethod
    def of(hf_config: Any) -> _Sizes:
        hf_config = as_config(hf_config)
        kwargs = family_of(hf_config).transformer_config(hf_config)
        return _Sizes(
            hidden=kwargs["hidden_size"],
            intermediate=kwargs["ffn_hidden_size"],
            num_heads=kwargs["num_attention_heads"],
            num_groups=kwargs["num_query_groups"],
            head_dim=kwargs["kv_channels"],
            vocab=hf_config.vocab_size,
            qkv_bias=kwargs["add_qkv_bias"],
            qk_norm=kwargs["qk_layernorm"],
            tied=bool(hf_config.tie_word_embeddings),
            head=head_of(hf_config),
            experts=family_of(hf_config).experts(hf_config),
        )


def logical_shapes(hf_config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model in Hugging Face terms: embedding, layers in order, norm, head."""
    sizes = _Sizes.of(hf_config)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (sizes.vocab, sizes.hidden)}
    for layer in range(as_config(hf_config).num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in _layer_shapes(sizes, layer).items()}
    shapes["model.norm.weight"] = (sizes.hidden,)
    if sizes.head == "reward":
        shapes[SCORE] = (1, sizes.hidden)
    elif not sizes.tied:
        shapes[HEAD] = (sizes.vocab, sizes.hidden)
    return shapes


def _layer_shapes(sizes: _Sizes, layer: int) -> dict[str, tuple[int, ...]]:
    query, key = sizes.num_heads * sizes.head_dim, sizes.num_groups * sizes.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (sizes.hidden,),
        "self_attn.q_proj.weight": (query, sizes.hidden),
        "self_attn.k_proj.weight": (key, sizes.hidden),
        "self_attn.v_proj.weight": (key, sizes.hidden),
        "self_attn.o_proj.weight": (sizes.hidden, query),
        "post_attention_layernorm.weight": (sizes.hidden,),
        **_mlp_shapes(sizes, layer),
    }
    if sizes.qkv_bias:
        shapes |= {"self_attn.q_proj.bias": (query,), "self_attn.k_proj.bias": (key,), "self_attn.v_proj.bias": (key,)}
    if sizes.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (sizes.head_dim,), "self_attn.k_norm.weight": (sizes.head_dim,)}
    return shapes


def _mlp_shapes(sizes: _Sizes, layer: int) -> dict[str, tuple[int, ...]]:
    experts = sizes.experts
    if experts is None or layer not in experts.layers:
        return {
            "mlp.gate_proj.weight": (sizes.intermediate, sizes.hidden),
            "mlp.up_proj.weight": (sizes.intermediate, sizes.hidden),
            "mlp.down_proj.weight": (sizes.hidden, sizes.intermediate),
        }
    shapes: dict[str, tuple[int, ...]] = {f"{experts.block}.gate.weight": (experts.count, sizes.hidden)}
    for number in range(experts.count):
        expert = f"{experts.block}.experts.{number}"
        shapes |= dict.fromkeys(
            (f"{expert}.{experts.gate}.weight", f"{expert}.{experts.up}.weight"), (experts.columns, sizes.hidden)
        )
        shapes[f"{expert}.{experts.down}.weight"] = (sizes.hidden, experts.columns)
    return shapes


def shard_parameters(
    hf_config: Any,
    *,
    tensor_rank: int,
    num_tensor: int,
    layers: range,
    has_embedding: bool,
    has_head: bool,
    expert_place: Place | None = None,
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
    sizes = _Sizes.of(hf_config)
    cut = _Cutter(tensor_rank, num_tensor)
    shards: list[ParameterShard] = []
    padded_vocab = -(-sizes.vocab // num_tensor) * num_tensor
    if has_embedding:
        shards.append(
            cut.rows("embedding.word_embeddings.weight", [(EMBEDDING, 0, sizes.vocab)], padded_vocab, sizes.hidden)
        )
    for layer in layers:
        shards.extend(_layer_shards(sizes, cut, layer))
        if sizes.experts is not None and layer in sizes.experts.layers:
            place = expert_place or Place(tensor=tensor_rank, num_tensor=num_tensor)
            shards.extend(_mixture_shards(sizes, sizes.experts, cut, place, layer))
        else:
            shards.extend(_mlp_shards(sizes, cut, layer))
    if has_head:
        shards.append(cut.whole("decoder.final_layernorm.weight", "model.norm.weight", sizes.hidden))
        if sizes.head == "reward":
            shards.append(cut.whole("output_layer.weight", SCORE, 1, sizes.hidden))
        elif not (sizes.tied and has_embedding):
            runs = [(EMBEDDING if sizes.tied else HEAD, 0, sizes.vocab)]
            head = cut.rows("output_layer.weight", runs, padded_vocab, sizes.hidden)
            shards.append(replace(head, is_primary=not sizes.tied))
    return shards


@dataclass(frozen=True)
class _Cutter:
    """Makes one tensor rank's shards."""

    rank: int
    num_ranks: int

    def _share(self, size: int) -> int:
        assert size % self.num_ranks == 0, (size, self.num_ranks)
        return size // self.num_ranks

    def rows(self, name: str, runs: list[Run], num_rows: int, *other: int) -> ParameterShard:
        """This rank's rows of the matrix (or vector) that `runs` stack up to."""
        share = self._share(num_rows)
        pieces = _interval(runs, self.rank * share, share)
        return ParameterShard(name, (share, *other), 0, tuple(pieces))

    def columns(self, name: str, logical_name: str, num_rows: int, num_columns: int) -> ParameterShard:
        share = self._share(num_columns)
        piece = Piece(logical_name, 1, self.rank * share, 0, share)
        return ParameterShard(name, (num_rows, share), 1, (piece,))

    def gated(self, name: str, gate: str, up: str, num_rows: int, num_columns: int) -> ParameterShard:
        """This rank's rows of `gate`, then its rows of `up`; both have `num_rows`."""
        share = self._share(num_rows)
        start = self.rank * share
        pieces = (Piece(gate, 0, start, 0, share), Piece(up, 0, start, share, share))
        return ParameterShard(name, (2 * share, num_columns), 0, pieces)

    def whole(self, name: str, logical_name: str, *shape: int) -> ParameterShard:
        piece = Piece(logical_name, 0, 0, 0, shape[0])
        return ParameterShard(name, shape, None, (piece,), is_primary=self.rank == 0)


def _interval(runs: list[Run], start: int, length: int) -> Iterator[Piece]:
    """Pieces of elements ``[start, start + length)`` of the stacked runs."""
    position = 0
    for name, first, count in runs:
        low, high = max(start, position), min(start + length, position + count)
        if low < high:
            yield Piece(name, 0, first + low - position, low - start, high - low)
        position += count


def _layer_shards(sizes: _Sizes, cut: _Cutter, layer: int) -> list[ParameterShard]:
    to, of = f"decoder.layers.{layer}", f"model.layers.{layer}"
    attention, hf_attention = f"{to}.self_attention", f"{of}.self_attn"
    num_qkv = (sizes.num_heads + 2 * sizes.num_groups) * sizes.head_dim
    shards = [
        cut.whole(f"{to}.input_layernorm.weight", f"{of}.input_layernorm.weight", sizes.hidden),
        cut.columns(
            f"{attention}.linear_proj.weight",
            f"{hf_attention}.o_proj.weight",
            sizes.hidden,
            sizes.num_heads * sizes.head_dim,
        ),
        cut.rows(f"{attention}.linear_qkv.weight", _qkv_runs(sizes, hf_attention, "weight"), num_qkv, sizes.hidden),
        cut.whole(f"{to}.pre_mlp_layernorm.weight", f"{of}.post_attention_layernorm.weight", sizes.hidden),
    ]
    if sizes.qkv_bias:
        shards.append(cut.rows(f"{attention}.linear_qkv.bias", _qkv_runs(sizes, hf_attention, "bias"), num_qkv))
    if sizes.qk_norm:
        shards += [
            cut.whole(f"{attention}.{norm}_layernorm.weight", f"{hf_attention}.{norm}_norm.weight", sizes.head_dim)
            for norm in "qk"
        ]
    return shards


def _mlp_shards(sizes: _Sizes, cut: _Cutter, layer: int) -> list[ParameterShard]:
    to, of = f"decoder.layers.{layer}.mlp", f"model.layers.{layer}.mlp"
    gate, up, down = (f"{of}.{name}_proj.weight" for name in ("gate", "up", "down"))
    return [
        cut.gated(f"{to}.linear_fc1.weight", gate, up, sizes.intermediate, sizes.hidden),
        cut.columns(f"{to}.linear_fc2.weight", down, sizes.hidden, sizes.intermediate),
    ]


def _mixture_shards(sizes: _Sizes, experts: Experts, cut: _Cutter, place: Place, layer: int) -> list[ParameterShard]:
    """The router, and this rank's experts under their numbers in the whole layer."""
    to, of = f"decoder.layers.{layer}.mlp", f"model.layers.{layer}.{experts.block}"
    shards = [cut.whole(f"{to}.router.weight", f"{of}.gate.weight", experts.count, sizes.hidden)]
    within, count = _Cutter(place.tensor, place.num_tensor), experts.count // place.num_expert
    for number in range(place.expert * count, (place.expert + 1) * count):
        local, expert = f"{to}.experts.local_experts.{number}", f"{of}.experts.{number}"
        gate, up, down = (f"{expert}.{name}.weight" for name in (experts.gate, experts.up, experts.down))
        shards += [
            within.gated(f"{local}.linear_fc1.weight", gate, up, experts.columns, sizes.hidden),
            within.columns(f"{local}.linear_fc2.weight", down, sizes.hidden, experts.columns),
        ]
    return shards


def _qkv_runs(sizes: _Sizes, attention: str, kind: str) -> list[Run]:
    head = sizes.head_dim
    heads = sizes.num_heads // sizes.num_groups * head
    runs = []
    for group in range(sizes.num_groups):
        runs.append((f"{attention}.q_proj.{kind}", group * heads, heads))
        runs += [(f"{attention}.{name}_proj.{kind}", group * head, head) for name in "kv"]
    return runs
