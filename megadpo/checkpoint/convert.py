"""Models out: checkpoints to Hugging Face, PEFT and Megatron-core directories, adapters into their base: offline."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from megadpo.checkpoint.companions import Companions, companion_files, companions_of, with_tokenizer
from megadpo.checkpoint.digest import model_files_digest
from megadpo.checkpoint.export import ExportPlan, finish_export, plan_export, write_export_files
from megadpo.checkpoint.finite import finite_only
from megadpo.checkpoint.hf import hf_directory, is_quantised, read_hf_config
from megadpo.checkpoint.importing import open_base
from megadpo.checkpoint.megatron import write_megatron
from megadpo.checkpoint.megatron_flags import behaviour_flags, size_flags
from megadpo.checkpoint.merged import MergedSource, UntiedSource, unties
from megadpo.checkpoint.parts import in_parts
from megadpo.checkpoint.peft import (
    adapter_dtype,
    base_of,
    is_adapter,
    is_reward_adapter,
    open_adapter,
    write_peft,
)
from megadpo.checkpoint.sharded import (
    INDEX,
    Checkpoint,
    companions_with_tensors,
    is_checkpoint,
    open_checkpoint,
    open_weights,
)
from megadpo.checkpoint.staging import abandon, begin, refuse_existing
from megadpo.console.activity import activity, counted_through
from megadpo.errors import UserError
from megadpo.model.adapters.spec import adapter_shapes
from megadpo.model.families import (
    TensorSource,
    check_tensors,
    logical_shapes,
    shape_of,
    untied,
)
from megadpo.model.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def export_megatron(path: str | Path, out: str | Path, dtype: torch.dtype | None = None, verify: bool = True) -> str:
    """Write a checkpoint of a whole model, or a Hugging Face directory, in Megatron-core's format (`write_megatron`).

    Returns:
        what Megatron-LM has to be told to compute this model.

    Raises:
        UserError: no model, a damaged one, adapters, or `out` is not empty.
    """
    out = Path(os.path.abspath(out))
    refuse_existing(out)
    if is_adapter(path):
        raise UserError(f"{path} has adapters, which Megatron's checkpoints do not: merge them by megadpo convert merge")
    config, source = read_hf_config(path), open_weights(path, verify)
    shape = shape_of(config)
    check_tensors(shape, source)
    if dtype is None and is_checkpoint(path):
        dtype = _saved_dtype(open_checkpoint(path, verify=False))
    write_megatron(source, shape, out, companions_of(path), dtype, str(path))
    return f"Megatron-LM computes this model with {' '.join([*size_flags(shape), *behaviour_flags(shape)])}"


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    verify: bool = True,
    dtype: torch.dtype | None = None,
    num_processes: int = 1,
) -> None:
    """Write a checkpoint's weights as a Hugging Face directory, those of adapters as a PEFT directory.

    In the type that the state's ``dtype`` names (training saves fp32 master weights), or as stored where it names none.
    An export that was killed goes on with the file that it was at.

    Args:
        dtype: of all tensors, in place of that.
        num_processes: that write files at once.
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
    dtype = dtype or _saved_dtype(opened)
    if is_adapter(checkpoint):
        _export_adapter(opened, shape_of(config), dtype, out)
        return
    check_tensors(shape_of(config), source)
    plan = plan_export(config, dtype or {name: source.dtype(name) for name in source.names()})
    work = functools.partial(_export_file, plan, str(out), str(checkpoint))
    digest = xxhash.xxh3_128_hexdigest((Path(checkpoint) / INDEX).read_bytes())
    try:
        in_parts(out, {"export": digest, "dtype": str(dtype)}, list(plan.files), work, num_processes)
        finish_export(plan, out, companions_with_tensors(checkpoint))
    except Exception:
        abandon(out)
        raise


def _saved_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """The type that a checkpoint's model has: training saves fp32 master weights."""
    named = checkpoint.state.get("dtype")
    saved = getattr(torch, named, None) if isinstance(named, str) else None
    if named is not None and not isinstance(saved, torch.dtype):
        raise UserError(f"{checkpoint.directory}: its state has dtype {named!r}, which is no torch dtype; it is damaged")
    return saved


def _export_file(plan: ExportPlan, out: str, checkpoint: str, file: str) -> dict[str, Any]:
    """Write one file of a plan; in a process of its own, which has nothing open yet."""
    source = open_checkpoint(checkpoint, verify=False).source("weights")
    own = replace(plan, files={file: plan.files[file]})
    names = counted_through(plan.files[file], f"converting {file}", len(plan.files[file]), "tensors")
    tensors = ((name, source.read(name, 0, 0, plan.shapes[name][0])) for name in names)
    records = write_export_files(own, Path(out), finite_only(tensors, checkpoint))
    source.release()
    return {"files": {name: record.to_json() for name, record in records.items()}}


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
    model = open_base(base_path, is_reward_adapter(adapter))
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
