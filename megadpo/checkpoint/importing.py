"""Models in: a Hugging Face or PEFT directory, or Megatron-core's, to a checkpoint: offline, without process groups."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megadpo.checkpoint.companions import companions_of
from megadpo.checkpoint.digest import model_files_digest, named_digest
from megadpo.checkpoint.export import kept_dtype
from megadpo.checkpoint.finite import is_finite
from megadpo.checkpoint.hf import hf_directory, read_hf_config
from megadpo.checkpoint.megatron import MegatronSource
from megadpo.checkpoint.megatron_flags import behaviour_flags
from megadpo.checkpoint.parts import in_parts
from megadpo.checkpoint.peft import (
    adapter_files,
    base_of,
    is_peft_directory,
    is_reward_adapter,
    open_adapter,
    peft_config,
)
from megadpo.checkpoint.resized import ResizedSource, refuse_rows_elsewhere, with_vocabulary
from megadpo.checkpoint.reward_model import as_reward_model
from megadpo.checkpoint.sharded import (
    commit,
    companions_with_tensors,
    is_checkpoint,
    open_weights,
    write_shard_file,
    writer_name,
)
from megadpo.checkpoint.staging import abandon, refuse_existing
from megadpo.checkpoint.torch_dist import METADATA, torch_dist_directory
from megadpo.console.activity import counted_through
from megadpo.data.rows.tokenise import load_tokenizer
from megadpo.errors import UserError
from megadpo.model.adapters.spec import AdapterSpec, adapter_shapes
from megadpo.model.families import (
    ParameterShard,
    TensorSource,
    check_tensors,
    names_in,
    shape_of,
    shard_parameters,
)
from megadpo.model.families.fill import fill_shard
from megadpo.model.shape import ModelShape
from megadpo.parallel.layout import Layout
from megadpo.validation.layout import check_layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class ImportOptions:
    """How a model is imported.

    Attributes:
        num_tensor, num_pipeline, stage_layers: in how many parts, and the layers of each stage (None: as even as possible).
        dtype: of all tensors; None: as they are.
        num_rows: of embedding and head; None: as many as there are.
        num_processes: that convert parts at once.
        config: the directory with config.json and tokenizer of a checkpoint of Megatron-core.
    """

    num_tensor: int = 1
    num_pipeline: int = 1
    stage_layers: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    num_rows: int | None = None
    num_processes: int = 1
    config: str | None = None

    @property
    def layout(self) -> Layout:
        """The parts as a layout of processes."""
        sequence = self.num_tensor > 1
        return Layout(tensor=self.num_tensor, pipeline=self.num_pipeline, sequence=sequence, chunk_layers=self.stage_layers)


def import_hf(
    hf_dir: str | Path,
    out: str | Path,
    num_tensor: int = 1,
    num_pipeline: int = 1,
    stage_layers: tuple[int, ...] | None = None,
    **others: Any,
) -> None:
    """`import_model` with the fields of `ImportOptions` as arguments."""
    import_model(hf_dir, out, ImportOptions(num_tensor, num_pipeline, stage_layers, **others))


def import_model(hf_dir: str | Path, out: str | Path, options: ImportOptions) -> tuple[str, ...]:
    """Write a Hugging Face model, or the adapter of a PEFT directory, as a checkpoint at step 0, in one part for each tensor
    rank and pipeline stage.

    Any layout can read the result; the one given here only decides how files are cut. An import that was killed goes on with
    the part that it was at.

    Returns:
        what the user has to know of it, in sentences.

    Raises:
        UserError: no such model, a damaged or unsupported one, a layout that does not fit it, or `out` is not empty.
    """
    out = Path(os.path.abspath(out))
    if is_checkpoint(hf_dir):
        raise UserError(f"{hf_dir} is a checkpoint already; import takes a Hugging Face directory")
    refuse_existing(out)
    opened = _open_import(hf_dir, options)
    model = opened.model
    check_layout(options.layout, model.shape)
    is_whole = opened.spec is None and options.config is None and torch_dist_directory(hf_dir) is None
    companions = companions_with_tensors(model.path) if is_whole else companions_of(model.path)
    if options.num_rows is not None:
        companions = replace(companions, settings={**companions.settings, "vocab_size": options.num_rows})
    parts = {
        writer_name(stage, rank): (stage, rank)
        for stage in range(options.num_pipeline)
        for rank in range(options.num_tensor)
    }
    work = functools.partial(_import_part, str(hf_dir), str(out), options, parts)
    key = {"import": opened.digest, "options": repr(options.layout), "dtype": str(options.dtype), "rows": options.num_rows}
    try:
        if options.num_processes == 1:
            work = functools.partial(_import_part, str(hf_dir), str(out), options, parts, opened=opened)
        manifests = in_parts(out, key, list(parts), work, options.num_processes)
        commit(out, manifests, opened.state, companions, model.config, opened.shapes)
    except Exception:
        abandon(out)
        raise
    return opened.notes


@dataclass(frozen=True)
class _Import:
    """What is imported: `source` has the tensors of `shapes`, of an adapter those of `spec`; `notes` are for the user."""

    model: Base
    source: TensorSource
    spec: AdapterSpec | None
    shapes: dict[str, tuple[int, ...]] | None
    state: dict[str, Any]
    digest: str
    notes: tuple[str, ...] = ()


def _open_import(hf_dir: str | Path, options: ImportOptions) -> _Import:
    megatron = torch_dist_directory(hf_dir)
    if megatron is None and options.config is not None:
        raise UserError(f"--config is for checkpoints of Megatron-core, and {hf_dir} is none; leave it out")
    if megatron is None and not is_peft_directory(hf_dir):
        model = open_base(hf_dir)
        digest = model_files_digest(hf_directory(model.path), Path(model.path))
        if options.num_rows is not None:
            config = with_vocabulary(model.config, options.num_rows, _num_ids(Path(model.path)))
            refuse_rows_elsewhere(model.source, model.shape)
            model = Base(model.path, config, shape_of(config), ResizedSource(model.source, options.num_rows))
        return _Import(model, model.source, None, None, {"step": 0}, digest)
    if megatron is not None:
        return _open_megatron(Path(hf_dir), megatron, options)
    if options.num_rows is not None:
        raise UserError(f"--resize-vocabulary is for models, and {hf_dir} is an adapter; resize its base")
    model = open_base(base_of(hf_dir), is_reward_adapter(hf_dir))
    adapter = open_adapter(hf_dir, model.shape, "HF_DIR")
    adapter.check_copies(model.source, model.path, "HF_DIR")
    state: dict[str, Any] = {"step": 0, "adapter": peft_config(adapter.spec, model.shape, adapter.base or model.path)}
    if adapter.base_digest is not None:
        state["inputs"] = {"model": adapter.base_digest}
    digest = named_digest(adapter_files(hf_dir))
    return _Import(model, adapter.source, adapter.spec, adapter_shapes(model.shape, adapter.spec), state, digest)


def _open_megatron(path: Path, directory: Path, options: ImportOptions) -> _Import:
    """A checkpoint of Megatron-core's, which says itself neither its config nor its tokenizer."""
    beside = path / "huggingface"
    if options.config is None and not beside.is_dir():
        raise UserError(
            f"{path} is a checkpoint of Megatron-core, which has no config.json and tokenizer: give a Hugging Face "
            "directory of the same model by --config DIR"
        )
    if options.num_rows is not None:
        raise UserError("--resize-vocabulary is for Hugging Face directories; import first, export, and import again")
    where = options.config or str(beside)
    config = read_hf_config(where)
    shape = shape_of(config)
    source = MegatronSource(directory, shape)
    model = Base(where, config, shape, source)
    told = f"its tensors do not show whether it was trained so, as its config says: {' '.join(behaviour_flags(shape))}"
    # Two models of the same shape have the same .metadata.
    files = (directory / METADATA, *sorted(directory.glob("*.distcp")), hf_directory(where) / "config.json")
    return _Import(model, source, None, None, {"step": 0}, named_digest(files), (*source.notes, told))


def _num_ids(directory: Path) -> int:
    """One more than the largest id that the tokenizer of a directory makes; 0 without one."""
    if not any(directory.glob("tokenizer*")):
        return 0
    vocabulary: dict[str, int] = load_tokenizer(str(directory)).get_vocab()
    return max(vocabulary.values()) + 1


def _import_part(
    hf_dir: str,
    out: str,
    options: ImportOptions,
    parts: Mapping[str, tuple[int, int]],
    name: str,
    opened: _Import | None = None,
) -> dict[str, Any]:
    """Write one rank's part; in a process of its own, which has nothing open yet."""
    opened = opened or _open_import(hf_dir, options)
    stage, rank = parts[name]
    shards = _shards(opened.model.shape, opened.source, options.layout, stage, rank, opened.spec)
    if options.dtype is not None:
        to = functools.partial(kept_dtype, dtype=options.dtype)
        shards = ((kind, shard, tensor.to(to(names_in(shard)[0]))) for kind, shard, tensor in shards)
    try:
        return write_shard_file(out, name, shards)
    finally:
        opened.source.release()


@dataclass(frozen=True)
class Base:
    """A model that is converted, opened."""

    path: str
    config: PretrainedConfig
    shape: ModelShape
    source: TensorSource


def open_base(path: str | Path, is_reward: bool = False) -> Base:
    """A model directory or checkpoint; of a reward model's adapter, with a head for it, whose values do not count."""
    config, source = read_hf_config(path), open_weights(path)
    check_tensors(shape_of(config), source)
    if is_reward:
        model = as_reward_model(config, source, hf_directory(path), seed=0)
        config, source = model.config, model.source
    return Base(str(path), config, shape_of(config), source)


def _shards(
    shape: ModelShape, source: TensorSource, layout: Layout, stage: int, rank: int, adapter: AdapterSpec | None
) -> Iterator[tuple[str, ParameterShard, Tensor]]:
    """Every primary shard of a rank, filled; of what is trained, with adapters."""
    shards = shard_parameters(
        shape,
        tensor_rank=rank,
        num_tensor=layout.tensor,
        layers=layout.layers_of_stage(shape.num_layers, stage),
        has_embedding=stage == 0,
        has_head=stage == layout.pipeline - 1,
    )
    if adapter is not None:
        from megadpo.model.adapters.shards import adapter_shards, is_trained_whole

        shards = [s for s in shards if is_trained_whole(adapter, s)] + adapter_shards(adapter, shards, rank)
    for shard in counted_through(shards, f"converting stage {stage}, tensor rank {rank}", len(shards), "tensors"):
        if shard.is_primary and shard.pieces:
            # Fused projections may differ in type: the widest holds them all exactly.
            dtype = functools.reduce(torch.promote_types, [source.dtype(piece.logical_name) for piece in shard.pieces])
            tensor = torch.empty(shard.shape, dtype=dtype)
            fill_shard(shard, source, tensor)
            if not is_finite(tensor):
                names = ", ".join(dict.fromkeys(piece.logical_name for piece in shard.pieces))
                raise UserError(f"the model's {names} is not finite, so nothing was written; get the model again")
            yield "weights", shard, tensor
