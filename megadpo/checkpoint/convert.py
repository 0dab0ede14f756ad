"""Hugging Face directory to checkpoint and back: offline, without process groups, one tensor at a time."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megadpo.checkpoint.companions import companion_files
from megadpo.checkpoint.export import finish_export, plan_export, write_export_files
from megadpo.checkpoint.finite import finite_only, is_finite
from megadpo.checkpoint.hf import open_hf, read_hf_config
from megadpo.checkpoint.sharded import commit, is_checkpoint, open_checkpoint, write_shard_file, writer_name
from megadpo.checkpoint.staging import abandon, begin, refuse_existing
from megadpo.errors import UserError
from megadpo.model.families import ParameterShard, TensorSource, check_tensors, shape_of, shard_parameters
from megadpo.model.shape import ModelShape
from megadpo.model.weights import fill_shard
from megadpo.parallel.layout import Layout
from megadpo.validation.layout import check_layout


def import_hf(
    hf_dir: str | Path,
    out: str | Path,
    num_tensor: int = 1,
    num_pipeline: int = 1,
    stage_layers: tuple[int, ...] | None = None,
) -> None:
    """Write a Hugging Face model as a checkpoint at step 0, in one part for each tensor rank and pipeline stage.

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
    shape = shape_of(read_hf_config(hf_dir))
    check_layout(layout, shape)
    source = open_hf(hf_dir)
    check_tensors(shape, source)
    companion_files(Path(hf_dir))
    begin(out)
    try:
        manifests = [
            write_shard_file(out, writer_name(stage, rank), _shards(shape, source, layout, stage, rank))
            for stage in range(num_pipeline)
            for rank in range(num_tensor)
        ]
        commit(out, manifests, {"step": 0}, hf_dir)
    except BaseException:
        abandon(out)
        raise


def export_checkpoint(checkpoint: str | Path, out: str | Path, verify: bool = True) -> None:
    """Write a checkpoint's weights as a Hugging Face directory.

    In the type that the state's ``dtype`` names (training saves fp32 master weights), or as stored where it names none.

    Args:
        verify: compare every byte of the checkpoint with the hashes that were written with it.

    Raises:
        UserError: no checkpoint, a damaged one, or `out` is not empty.
    """
    out, opened = Path(os.path.abspath(out)), open_checkpoint(checkpoint, verify)
    refuse_existing(out)
    if verify:
        opened.check_files()
    config, source = read_hf_config(checkpoint), opened.source("weights")
    check_tensors(shape_of(config), source)
    named = opened.state.get("dtype")
    dtype = getattr(torch, named, None) if isinstance(named, str) else None
    if named is not None and not isinstance(dtype, torch.dtype):
        raise UserError(f"{checkpoint}: its state has dtype {named!r}, which is no torch dtype; it is damaged")
    plan = plan_export(config, dtype or {name: source.dtype(name) for name in source.names()})
    begin(out)
    try:
        tensors = ((name, source.read(name, 0, 0, size[0])) for name, size in plan.shapes.items())
        write_export_files(plan, out, finite_only(tensors, str(checkpoint)))
        finish_export(plan, out, checkpoint)
    except BaseException:
        abandon(out)
        raise


def _shards(
    shape: ModelShape, source: TensorSource, layout: Layout, stage: int, rank: int
) -> Iterator[tuple[str, ParameterShard, Tensor]]:
    """Every primary shard of a rank, filled."""
    shards = shard_parameters(
        shape,
        tensor_rank=rank,
        num_tensor=layout.tensor,
        layers=layout.layers_of_stage(shape.num_layers, stage),
        has_embedding=stage == 0,
        has_head=stage == layout.pipeline - 1,
    )
    for shard in shards:
        if shard.is_primary and shard.pieces:
            # Fused projections may differ in type: the widest holds them all exactly.
            dtype = functools.reduce(torch.promote_types, [source.dtype(piece.logical_name) for piece in shard.pieces])
            tensor = torch.empty(shard.shape, dtype=dtype)
            fill_shard(shard, source, tensor)
            if not is_finite(tensor):
                names = ", ".join(dict.fromkeys(piece.logical_name for piece in shard.pieces))
                raise UserError(f"the model's {names} is not finite, so nothing was written; get the model again")
            yield "weights", shard, tensor
