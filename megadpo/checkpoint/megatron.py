"""Models in checkpoints of Megatron-LM, Megatron Bridge and NeMo: Megatron's global tensors as logical ones, and back.

Megatron-core stacks the layers of a model whose layers are alike: ``decoder.layers.mlp.linear_fc2.weight`` [layers, …], and
the experts of a layer, ``….mlp.experts.experts.linear_fc2.weight`` [layers, experts, …]; else the layer's number stands in
the name. A global tensor is what a single tensor rank holds, so that `shard_parameters` of one says where it lies.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megadpo.checkpoint.companions import Companions, write_companions
from megadpo.checkpoint.export import kept_dtype, write_json
from megadpo.checkpoint.finite import is_finite
from megadpo.checkpoint.megatron_flags import is_padded, refuse_other_models
from megadpo.checkpoint.staging import abandon, begin, publish, staging, writing
from megadpo.checkpoint.torch_dist import LATEST, TorchDistFiles, regions
from megadpo.console.activity import counted_through
from megadpo.errors import UserError
from megadpo.model.families import ParameterShard, ShardPiece, TensorSource, names_in, shard_parameters
from megadpo.model.families.fill import fill_shard
from megadpo.model.shape import ModelShape

if TYPE_CHECKING:
    from megadpo.checkpoint.torch_dist_writer import TorchDistWriter

PREFIXES = ("", "module.", "model.", "model.module.", "module.module.")
"""Of Megatron-LM and Bridge, then of NeMo and of wrapped models."""
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.*)")
_FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Norms that TransformerEngine has within the projection after them; Megatron-core's own layers are saved so, too."""
_STATES: tuple[str, ...] = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
_SHARED_STATES = ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")


@dataclass(frozen=True)
class Place:
    """Where a whole Megatron parameter lies in a checkpoint: ``tensors[name][index]``."""

    name: str
    index: tuple[int, ...] = ()


def places(parameter: str, is_stacked: bool) -> list[Place]:
    """Where a parameter with a layer's global number may lie, the usual place first."""
    found = _LAYER.fullmatch(parameter)
    if found is None:
        return [Place(parameter)]
    layer, rest = int(found[1]), found[2]
    index: tuple[int, ...] = (layer,) if is_stacked else ()
    stem = "decoder.layers." if is_stacked else f"decoder.layers.{layer}."
    if expert := _EXPERT.fullmatch(rest):
        return [Place(f"{stem}mlp.experts.experts.{expert[2]}", (*index, int(expert[1])))]
    return [Place(stem + name, index) for name in dict.fromkeys((_FUSED.get(rest, rest), rest))]


def whole_shards(shape: ModelShape) -> list[ParameterShard]:
    """Every parameter of the model, whole: those of one tensor rank and one stage."""
    layers = range(shape.num_layers)
    return shard_parameters(shape, tensor_rank=0, num_tensor=1, layers=layers, has_embedding=True, has_head=True)


class MegatronSource:
    """The logical tensors of a model in a ``torch_dist`` checkpoint, as a TensorSource.

    Args:
        shape: of the model that its config.json describes.

    Attributes:
        notes: what is left out of it, in sentences.

    Raises:
        UserError: no such checkpoint, or one of another model: naming the tensor.
    """

    def __init__(self, directory: Path, shape: ModelShape) -> None:
        refuse_other_models(shape, f"the model of {directory}")
        self._files = TorchDistFiles(directory)
        self._directory, self._shapes, self._model = directory, dict[str, tuple[int, ...]](), shape
        self._pieces: dict[str, list[tuple[ShardPiece, Place]]] = {}
        self.notes: tuple[str, ...] = ()
        for shard in whole_shards(shape):
            place = self._place(shard)
            for piece in shard.pieces:
                self._pieces.setdefault(piece.logical_name, []).append((piece, place))
                self._note(piece, shard.shape)
        self._refuse_others(shape)

    def _place(self, shard: ParameterShard) -> Place:
        tensors = self._files.tensors
        candidates = [
            Place(prefix + place.name, place.index)
            for prefix in PREFIXES
            for is_stacked in (True, False)
            for place in places(shard.name, is_stacked)
        ]
        place = next((place for place in candidates if place.name in tensors), None)
        if place is None:
            raise UserError(
                f"{self._directory} has no tensor {candidates[0].name} ({names_in(shard)[0]}), which its config asks for"
            )
        self._check_stack(place)
        found = tensors[place.name].shape[len(place.index) :]
        is_vocabulary = not place.index and shard.name in ("embedding.word_embeddings.weight", "output_layer.weight")
        if is_vocabulary and found[1:] == shard.shape[1:] and found[0] > shard.shape[0]:
            self._note_padding(place.name, found[0], shard.shape[0])
        elif found != shard.shape:
            raise UserError(
                f"{self._directory}: {place.name} has shape {list(found)}, but its config asks for {list(shard.shape)}"
            )
        return place

    def _note_padding(self, name: str, num_rows: int, vocab_size: int) -> None:
        """Rows beyond the vocabulary are left out where Megatron pads so."""
        if not is_padded(num_rows, vocab_size):
            raise UserError(
                f"{self._directory}: {name} has {num_rows} rows, but its config says vocab_size {vocab_size}, which "
                "Megatron does not pad to so many (the next multiple of --make-vocab-size-divisible-by, at most 128, times "
                "the tensor ranks); give the config.json of this model"
            )
        beyond = f"the {num_rows - vocab_size} rows beyond vocab_size {vocab_size}"
        self.notes += (f"{name}: {beyond} are Megatron's padding, left out",)

    def _check_stack(self, place: Place) -> None:
        """As many layers and experts as the model has lie in the tensor."""
        num_experts = self._model.experts.count if self._model.experts is not None else 0
        of_experts = (num_experts,) if "mlp.experts.experts." in place.name else ()
        expected = (*(self._model.num_layers,) * (len(place.index) > len(of_experts)), *of_experts)
        found = self._files.tensors[place.name].shape[: len(place.index)]
        if found != expected:
            what = "layers and experts" if len(expected) == 2 else "experts" if of_experts else "layers"
            raise UserError(
                f"{self._directory}: {place.name} has {' and '.join(map(str, found))} {what}, but its config says "
                f"{' and '.join(map(str, expected))}; give the config.json of this model"
            )

    def _note(self, piece: ShardPiece, size: tuple[int, ...]) -> None:
        before = self._shapes.get(piece.logical_name, (0,) * len(size))
        end = max(before[piece.dim], piece.logical_start + piece.length)
        self._shapes[piece.logical_name] = (*size[: piece.dim], end, *size[piece.dim + 1 :])

    def _refuse_others(self, shape: ModelShape) -> None:
        """Parameters that the model does not have: of another one, whose outputs would be others."""
        used = {place.name for pieces in self._pieces.values() for _, place in pieces}
        norms = {name for norm in _FUSED for number in range(shape.num_layers) for name in _both(norm, number)}
        for name in sorted(self._files.tensors.keys() - used):
            plain = name
            for prefix in PREFIXES[1:]:
                plain = plain.removeprefix(prefix)
            if plain.startswith(("decoder.", "embedding.", "output_layer.")) and plain not in norms:
                raise UserError(
                    f"{self._directory} has the tensor {name}, which the config given for it does not know; give the "
                    "config.json of this model"
                )

    def names(self) -> Iterable[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._files.tensors[self._pieces[name][0][1].name].dtype

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        size = list(self._shapes[name])
        size[dim] = length
        out = torch.empty(size, dtype=self.dtype(name))
        for piece, place in self._pieces[name]:
            if piece.dim != dim:
                sizes = list(self._shapes[name])
                sizes[piece.dim], sizes[dim] = piece.length, length
                offsets = [0] * len(sizes)
                offsets[piece.dim], offsets[dim] = piece.local_start, start
                out.narrow(piece.dim, piece.logical_start, piece.length).copy_(self._region(place, offsets, sizes))
                continue
            low = max(start, piece.logical_start)
            high = min(start + length, piece.logical_start + piece.length)
            if low < high:
                local = piece.local_start + low - piece.logical_start
                part = self._region(place, *regions(self._shapes[name], dim, local, high - low))
                out.narrow(dim, low - start, high - low).copy_(part)
        return out

    def _region(self, place: Place, offsets: list[int], sizes: list[int]) -> Tensor:
        ones = [1] * len(place.index)
        return self._files.read(place.name, [*place.index, *offsets], [*ones, *sizes]).reshape(sizes)

    def release(self) -> None:
        self._files.release()


def _both(norm: str, layer: int) -> Iterator[str]:
    for is_stacked in (True, False):
        for place in places(f"decoder.layers.{layer}.{norm}", is_stacked):
            yield place.name


def write_megatron(
    source: TensorSource, shape: ModelShape, out: Path, companions: Companions, dtype: torch.dtype | None, what: str
) -> None:
    """Write a model as Megatron-LM's release of it: ``out/release`` in the format ``torch_dist``, a tensor at a time, and
    ``out/huggingface`` with config.json and tokenizer.

    Layers are stacked where all are alike, else by number, as Megatron-core looks for them.

    Args:
        dtype: of all tensors; None: as they are.
        what: the model's directory, for sentences.

    Raises:
        UserError: layers that Megatron's GPT model does not have, weights that are not finite, or the disk refuses.
    """
    refuse_other_models(shape, what)
    begin(out)
    partial = staging(out)
    release = partial / "release"
    try:
        with writing(release):
            release.mkdir()
        from megadpo.checkpoint.torch_dist_writer import TorchDistWriter  # what it imports takes more than a second

        writer = TorchDistWriter(release)
        try:
            _write_tensors(writer, source, shape, dtype, what)
            writer.finish({"checkpoint_version": 3.0, "iteration": 0})
        finally:
            writer.close()
        (partial / LATEST).write_text("release")
        with writing(partial / "huggingface"):
            (partial / "huggingface").mkdir()
        settings = companions.settings
        if dtype is not None:
            settings = settings | {"dtype": str(dtype).removeprefix("torch.")}
        write_json(partial / "huggingface" / "config.json", settings)
        write_companions(companions, partial / "huggingface")
        publish(out)
    except BaseException:
        abandon(out)
        raise


def _write_tensors(
    writer: TorchDistWriter, source: TensorSource, shape: ModelShape, dtype: torch.dtype | None, what: str
) -> None:
    experts = shape.experts
    is_stacked = experts is None or len(experts.layers) == shape.num_layers
    shards = [shard for shard in whole_shards(shape) if shard.pieces]
    types = _types(shards, source, is_stacked)
    for shard in counted_through(shards, "converting", len(shards), "tensors"):
        found = places(shard.name, is_stacked)
        for place in found if experts is not None and shard.name.endswith("pre_mlp_layernorm.weight") else found[:1]:
            own = types[found[0].name] if dtype is None else kept_dtype(names_in(shard)[0], dtype)
            values = torch.empty(shard.shape, dtype=own)
            fill_shard(shard, source, values)
            if not is_finite(values):
                raise UserError(f"{what}: {names_in(shard)[0]} is not finite, so nothing was written")
            leading = _leading(place, shape, is_stacked)
            offsets = (*place.index, *(0 for _ in shard.shape))
            writer.add(place.name, (*leading, *shard.shape), offsets, values.reshape(*(1 for _ in leading), *shard.shape))
    for name in _state_names(shape, is_stacked):
        writer.add_empty(name)


def _types(shards: Iterable[ParameterShard], source: TensorSource, is_stacked: bool) -> dict[str, torch.dtype]:
    """The type of each global tensor: the widest of what it is made of, which holds all exactly."""
    types: dict[str, torch.dtype] = {}
    for shard in shards:
        name = places(shard.name, is_stacked)[0].name
        own = [source.dtype(piece.logical_name) for piece in shard.pieces]
        types[name] = functools.reduce(torch.promote_types, own, types.get(name, own[0]))
    return types


def _leading(place: Place, shape: ModelShape, is_stacked: bool) -> tuple[int, ...]:
    """Sizes of the dimensions that layers and experts are stacked in."""
    sizes = [shape.num_layers] if is_stacked and place.index else []
    if len(place.index) > len(sizes):
        assert shape.experts is not None
        sizes.append(shape.experts.count)
    return tuple(sizes)


def _state_names(shape: ModelShape, is_stacked: bool) -> Iterator[str]:
    """Objects of the layers that Megatron asks for when it loads."""
    for layer in range(shape.num_layers):
        has_experts = shape.experts is not None and layer in shape.experts.layers
        modules = _STATES[:2] if has_experts else _STATES
        if has_experts and shape.experts is not None and shape.experts.shared is not None:
            modules += _SHARED_STATES
        for module in modules:
            if is_stacked:
                yield f"decoder.layers.{module}._extra_state/shard_{layer}_{shape.num_layers}"
            else:
                yield f"decoder.layers.{layer}.{module}._extra_state/shard_0_1"
        if has_experts and shape.experts is not None:
            count = shape.experts.count
            for module in ("linear_fc1", "linear_fc2"):
                for number in range(count):
                    stem = "decoder.layers." if is_stacked else f"decoder.layers.{layer}."
                    end = f"{layer}.{number}_{shape.num_layers}.{count}" if is_stacked else f"{number}_{count}"
                    yield f"{stem}mlp.experts.experts.{module}._extra_state/shard_{end}"
