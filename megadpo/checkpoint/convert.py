"""Hugging Face directory to checkpoint and back: offline, without process groups, one tensor at a time."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megadpo.checkpoint.companions import Companions, companion_files, companions_of, with_tokenizer
from megadpo.checkpoint.digest import model_files_digest
from megadpo.checkpoint.export import finish_export, plan_export, write_export_files
from megadpo.checkpoint.finite import finite_only, is_finite
from megadpo.checkpoint.hf import hf_directory, is_quantised, read_hf_config
from megadpo.checkpoint.merged import MergedSource, UntiedSource, unties
from megadpo.checkpoint.peft import (
    adapter_dtype,
    base_of,
    is_adapter,
    is_peft_directory,
    is_reward_adapter,
    open_adapter,
    peft_config,
    write_peft,
)
from megadpo.checkpoint.reward_model import as_reward_model
from megadpo.checkpoint.sharded import (
    Checkpoint,
    commit,
    companions_with_tensors,
    is_checkpoint,
    open_checkpoint,
    open_weights,
    write_shard_file,
    writer_name,
)
from megadpo.checkpoint.staging import abandon, begin, refuse_existing
from megadpo.console.activity import activity, counted_through
from megadpo.errors import UserError
from megadpo.model.adapters.spec import AdapterSpec, adapter_shapes
from megadpo.model.families import (
    ParameterShard,
    TensorSource,
    check_tensors,
    logical_shapes,
    shape_of,
    shard_parameters,
    untied,
)
from megadpo.model.shape import ModelShape
from megadpo.model.weights import fill_shard
from megadpo.parallel.layout import Layout
from megadpo.validation.layout import check_layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def import_hf(
    hf_dir: str | Path,
    out: str | Path,
    num_tensor: int = 1,
    num_pipeline: int = 1,
    stage_layers: tuple[int, ...] | None = None,
) -> None:
    """Write a Hugging Face model, or the adapter of a PEFT directory, as a checkpoint at step 0, in one part for each tensor
    rank and pipeline stage.

    Tensors keep their types. Any layout can read the result; the one given here only decides how files are cut.

    Args:
        stage_layers: layers of each pipeline stage; None: as even as possible.

    Raises:
        UserError: no such model, a damaged or unsupported one, a layout that does not fit it, or `out` is not empty.
    """
    out = Path(os.path.abspath(out))
    layout = Layout(tensor=num_tensor, pipeline=num_pipeline, sequence=num_tensor > 1, chunk_layers=stage_layers)
    if is_checkpoint(hf_dir):
        raise UserError(f"{hf_dir} is a checkpoint already; import takes a Hugging Face directory")
    refuse_existing(out)
    model = _open_base(base_of(hf_dir), is_reward_adapter(hf_dir)) if is_peft_directory(hf_dir) else _open_base(hf_dir)
    check_layout(layout, model.shape)
    companions = companions_of(model.path) if is_peft_directory(hf_dir) else companions_with_tensors(model.path)
    state: dict[str, Any] = {"step": 0}
    source, spec, shapes = model.source, None, None
    if is_peft_directory(hf_dir):
        adapter = open_adapter(hf_dir, model.shape, "HF_DIR")
        adapter.check_copies(model.source, model.path, "HF_DIR")
        source, spec, shapes = adapter.source, adapter.spec, adapter_shapes(model.shape, adapter.spec)
        state["adapter"] = peft_config(spec, model.shape, adapter.base or model.path)
        if adapter.base_digest is not None:
            state["inputs"] = {"model": adapter.base_digest}
    begin(out)
    try:
        manifests = [
            write_shard_file(out, writer_name(stage, rank), _shards(model.shape, source, layout, stage, rank, spec))
            for stage in range(num_pipeline)
            for rank in range(num_tensor)
        ]
        commit(out, manifests, state, companions, model.config, shapes)
    except BaseException:
        abandon(out)
        raise


def export_checkpoint(checkpoint: str | Path, out: str | Path, verify: bool = True) -> None:
    """Write a checkpoint's weights as a Hugging Face directory, those of adapters as a PEFT directory.

    In the type that the state's ``dtype`` names (training saves fp32 master weights), or as stored where it names none.

    Args:
        verify: compare every byte of the checkpoint with the hashes that were written with it.

    Raises:
        UserError: no checkpoint, a damaged one, or `out` is not empty.
    """
    out, opened = Path(os.path.abspath(out)), open_checkpoint(checkpoint, verify)
    refuse_existing(out)
    if verify:
        with activity("verifying the checkpoint"):
            opened.check_files()
    config, source = read_hf_config(checkpoint), opened.source("weights")
    named = opened.state.get("dtype")
    dtype = getattr(torch, named, None) if isinstance(named, str) else None
    if named is not None and not isinstance(dtype, torch.dtype):
        raise UserError(f"{checkpoint}: its state has dtype {named!r}, which is no torch dtype; it is damaged")
    if is_adapter(checkpoint):
        _export_adapter(opened, shape_of(config), dtype, out)
        return
    check_tensors(shape_of(config), source)
    _export_model(config, source, dtype or {name: source.dtype(name) for name in source.names()}, out, str(checkpoint))


def merge_adapter(
    adapter: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> None:
    """Write the model that an adapter makes of its base as a Hugging Face directory, a tensor at a time.

    Args:
        adapter: a PEFT directory or a checkpoint of a run with adapters.
        base: the model's directory; None: the one that the adapter names.
        dtype: of all tensors; None: as the base has them. The sums are done in float32 and rounded once.
        verify: compare every byte of a checkpoint with the hashes that were written with it.

    Raises:
        UserError: no adapter or base, one of another model, a damaged one, or `out` is not empty.
    """
    out = Path(os.path.abspath(out))
    if not Path(adapter).is_dir() or not is_adapter(adapter):
        raise UserError(f"{adapter} is no adapter: neither a PEFT directory nor a checkpoint of a run with adapters")
    refuse_existing(out)
    base_path = base_of(adapter) if base is None else base
    if is_quantised(base_path):
        raise UserError(
            f"{base_path} is quantised (its config.json has quantization_config), and such weights take no adapter in; name "
            "the model that it was made from, in bf16 or fp32: --base DIR"
        )
    model = _open_base(base_path, is_reward_adapter(adapter))
    opened = open_adapter(adapter, model.shape, "ADAPTER", verify=verify)
    digest = model_files_digest(hf_directory(model.path), Path(model.path))
    setting = "ADAPTER" if base is None else "--base"
    opened.check_base(model.path, digest, setting)
    opened.check_copies(model.source, model.path, setting)
    config, frozen = model.config, model.source
    if unties(opened.spec, model.shape):
        config, frozen = untied(config), UntiedSource(frozen)
    source = MergedSource(frozen, opened.source, opened.spec)
    dtypes = {name: frozen.dtype(name) for name in logical_shapes(shape_of(config))}
    companions = companions_with_tensors(model.path)
    trained = companion_files(hf_directory(adapter))
    companions = replace(companions, files=with_tokenizer(companions.files, trained))
    _export_model(config, source, dtype or dtypes, out, str(adapter), companions)


def _export_model(
    config: PretrainedConfig,
    source: TensorSource,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    out: Path,
    what: str,
    companions: Companions | None = None,
) -> None:
    plan = plan_export(config, dtype)
    begin(out)
    try:
        shapes = counted_through(plan.shapes.items(), "converting", len(plan.shapes), "tensors")
        tensors = ((name, source.read(name, 0, 0, size[0])) for name, size in shapes)
        write_export_files(plan, out, finite_only(tensors, what))
        finish_export(plan, out, companions or companions_with_tensors(what))
    except BaseException:
        abandon(out)
        raise


def _export_adapter(checkpoint: Checkpoint, shape: ModelShape, dtype: torch.dtype | None, out: Path) -> None:
    adapter = open_adapter(checkpoint.directory, shape, "CHECKPOINT", verify=False)
    tensors = {}
    for name, size in adapter_shapes(shape, adapter.spec).items():
        values = adapter.source.read(name, 0, 0, size[0])
        tensors[name] = values if dtype is None else values.to(adapter_dtype(name, dtype))
    begin(out)
    try:
        tensors = dict(finite_only(tensors.items(), str(checkpoint.directory)))
        companions = companions_of(checkpoint.directory)
        write_peft(out, adapter.spec, shape, tensors, adapter.base or "", companions, adapter.base_digest)
    except BaseException:
        abandon(out)
        raise


@dataclass(frozen=True)
class _Base:
    path: str
    config: PretrainedConfig
    shape: ModelShape
    source: TensorSource


def _open_base(path: str | Path, is_reward: bool = False) -> _Base:
    """A model directory or checkpoint; of a reward model's adapter, with a head for it, whose values do not count."""
    config, source = read_hf_config(path), open_weights(path)
    check_tensors(shape_of(config), source)
    if is_reward:
        model = as_reward_model(config, source, hf_directory(path), seed=0)
        config, source = model.config, model.source
    return _Base(str(path), config, shape_of(config), source)


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
