"""Where a rank's adapters lie in PEFT's tensors, which follows from where the matrices that they adapt lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megadpo.model.adapters.linear import Projection
from megadpo.model.adapters.spec import (
    EMBEDDING_A,
    EMBEDDING_B,
    EMBEDDING_MODULE,
    HEAD_MODULE,
    KINDS,
    MAGNITUDE,
    A,
    AdapterSpec,
    B,
)
from megadpo.model.families import ExpertPlace, ParameterShard, ShardPiece
from megadpo.model.moe.layer import is_expert

_WEIGHT = ".weight"
_EMBEDDING, _HEAD, _LAST_NORM = "embedding.word_embeddings", "output_layer", "decoder.final_layernorm"


@dataclass(frozen=True)
class LayerAdapter:
    """The adapters of one Megatron layer on one rank.

    Attributes:
        layer: its name with the global layer number, e.g. ``decoder.layers.3.self_attention.linear_qkv``.
        is_row_parallel: its matrix is cut by columns.
        shards: of its parameters, by their names in the layer.
    """

    layer: str
    is_row_parallel: bool
    projections: tuple[Projection, ...]
    shards: dict[str, ParameterShard]


def layer_adapters(
    spec: AdapterSpec, shards: Sequence[ParameterShard], tensor_rank: int, expert_place: ExpertPlace | None = None
) -> list[LayerAdapter]:
    """The adapters of the layers whose matrices are among a rank's `shards`.

    Args:
        tensor_rank: that rank's.
        expert_place: as in `shard_parameters`.
    """
    adapted, found = frozenset(spec.modules), _of_vocabulary(spec, shards, is_first=tensor_rank == 0)
    for shard in shards:
        if shard.name in (_EMBEDDING + _WEIGHT, _HEAD + _WEIGHT):
            continue
        modules = dict.fromkeys(piece.logical_name.removesuffix(_WEIGHT) for piece in shard.pieces)
        here = [module for module in modules if module in adapted and shard.name.endswith(_WEIGHT)]
        if here:
            rank = expert_place.tensor if expert_place is not None and is_expert(shard.name) else tensor_rank
            found.append(_layer_adapter(spec, shard, here, is_first=rank == 0))
    return found


def adapter_shards(
    spec: AdapterSpec, shards: Sequence[ParameterShard], tensor_rank: int, expert_place: ExpertPlace | None = None
) -> list[ParameterShard]:
    """`layer_adapters`, their parameters alone."""
    return [shard for layer in layer_adapters(spec, shards, tensor_rank, expert_place) for shard in layer.shards.values()]


def is_adapters(shard: ParameterShard) -> bool:
    """Whether a parameter is an adapter's, none of the model's own."""
    return bool(shard.pieces) and shard.pieces[0].logical_name.endswith(tuple(f".{kind}" for kind in KINDS))


def is_trained_whole(spec: AdapterSpec, shard: ParameterShard) -> bool:
    """Whether a parameter of the model is trained beside the adapters."""
    return any(piece.logical_name.rpartition(".")[0] in spec.modules_to_save for piece in shard.pieces)


def _of_vocabulary(spec: AdapterSpec, shards: Sequence[ParameterShard], is_first: bool) -> list[LayerAdapter]:
    """The adapters of embedding and head. The head of a tied model is the embedding, or a copy of it on the last stage."""
    matrices, found = {shard.name.removesuffix(_WEIGHT): shard for shard in shards}, []
    if EMBEDDING_MODULE in spec.modules and _EMBEDDING in matrices:
        found.append(_embedding_adapter(spec, matrices[_EMBEDDING], is_first))
    if HEAD_MODULE in spec.modules and _LAST_NORM in matrices:
        found.append(_head_adapter(spec, matrices.get(_HEAD) or matrices[_EMBEDDING], is_first))
    return found


def _embedding_adapter(spec: AdapterSpec, matrix: ParameterShard, is_first: bool) -> LayerAdapter:
    rank, (num_rows, hidden) = spec.rank_of(EMBEDDING_MODULE), matrix.shape
    columns = tuple(replace(piece, logical_name=f"{EMBEDDING_MODULE}.{EMBEDDING_A}", dim=1) for piece in matrix.pieces)
    whole = ShardPiece(f"{EMBEDDING_MODULE}.{EMBEDDING_B}", 0, 0, 0, hidden)
    shards = {
        "lora_A": ParameterShard(f"{_EMBEDDING}.lora_A", (rank, num_rows), 1, columns),
        "lora_B": ParameterShard(f"{_EMBEDDING}.lora_B", (hidden, rank), None, (whole,), is_primary=is_first),
    }
    return LayerAdapter(_EMBEDDING, False, (_only_projection(spec, EMBEDDING_MODULE),), shards)


def _head_adapter(spec: AdapterSpec, matrix: ParameterShard, is_first: bool) -> LayerAdapter:
    rank, (num_rows, hidden) = spec.rank_of(HEAD_MODULE), matrix.shape
    rows = tuple(replace(piece, logical_name=f"{HEAD_MODULE}.{B}") for piece in matrix.pieces)
    whole = ShardPiece(f"{HEAD_MODULE}.{A}", 0, 0, 0, rank)
    shards = {
        "lora_A": ParameterShard(f"{_HEAD}.lora_A", (rank, hidden), None, (whole,), is_primary=is_first),
        "lora_B": ParameterShard(f"{_HEAD}.lora_B", (num_rows, rank), 0, rows),
    }
    return LayerAdapter(_HEAD, False, (_only_projection(spec, HEAD_MODULE),), shards)


def _only_projection(spec: AdapterSpec, module: str) -> Projection:
    return Projection(module, spec.rank_of(module), spec.scaling(module), 0, ())


def _layer_adapter(spec: AdapterSpec, shard: ParameterShard, modules: list[str], is_first: bool) -> LayerAdapter:
    layer, is_row_parallel = shard.name.removesuffix(_WEIGHT), shard.partition_dim == 1
    projections, first = [], 0
    for module in modules:
        pieces = [piece for piece in shard.pieces if piece.logical_name == module + _WEIGHT]
        rows = (
            tuple((piece.local_start, piece.length) for piece in pieces) if not is_row_parallel else ((0, shard.shape[0]),)
        )
        projections.append(Projection(module, spec.rank_of(module), spec.scaling(module), first, rows))
        first += spec.rank_of(module)
    shards = {"lora_A": _a(layer, shard, projections, first, is_first)}
    for projection in projections:
        rows_of = [piece for piece in shard.pieces if piece.logical_name == projection.module + _WEIGHT]
        kinds = [("lora_B", B, (projection.rank,))] + ([("magnitude", MAGNITUDE, ())] if spec.use_dora else [])
        for kind, logical, columns in kinds:
            name = f"{kind}_{projection.short_name}"
            shards[name] = _outputs(
                f"{layer}.{name}", f"{projection.module}.{logical}", columns, projection, rows_of, is_row_parallel, is_first
            )
    return LayerAdapter(layer, is_row_parallel, tuple(projections), shards)


def _a(layer: str, matrix: ParameterShard, projections: list[Projection], num_rows: int, is_first: bool) -> ParameterShard:
    """The stacked A: whole beside a matrix that is cut by rows, cut as the matrix is beside one that is cut by columns."""
    shape = (num_rows, matrix.shape[1])
    if matrix.partition_dim == 1:
        (projection,), (piece,) = projections, matrix.pieces
        cut = ShardPiece(f"{projection.module}.{A}", 1, piece.logical_start, piece.local_start, piece.length)
        return ParameterShard(f"{layer}.lora_A", shape, 1, (cut,))
    pieces = tuple(ShardPiece(f"{each.module}.{A}", 0, 0, each.first, each.rank) for each in projections)
    return ParameterShard(f"{layer}.lora_A", shape, None, pieces, is_primary=is_first)


def _outputs(
    name: str,
    logical_name: str,
    columns: tuple[int, ...],
    projection: Projection,
    pieces: list[ShardPiece],
    is_row_parallel: bool,
    is_first: bool,
) -> ParameterShard:
    """What has a row for each output: this rank's, in their order in the layer, or all."""
    num_rows = sum(length for _, length in projection.rows)
    if is_row_parallel:
        whole = ShardPiece(logical_name, 0, 0, 0, num_rows)
        return ParameterShard(name, (num_rows, *columns), None, (whole,), is_primary=is_first)
    own, start = [], 0
    for piece in pieces:
        own.append(ShardPiece(logical_name, 0, piece.logical_start, start, piece.length))
        start += piece.length
    return ParameterShard(name, (num_rows, *columns), 0, tuple(own))
