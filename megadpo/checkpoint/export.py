"""Hugging Face model directories, written: several writers, each its own files, planned from the shapes alone.

::

    plan = plan_export(hf_config, torch.bfloat16, stages=[range(0, 16), range(16, 32)])   # on every writer
    begin(directory)                                                                      # one process
    write_export_files(plan, directory, tensors)                                          # every writer
    finish_export(plan, directory, hf_source_dir)                                         # one process
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megadpo.checkpoint.companions import Companions, companions_of, write_companions
from megadpo.checkpoint.fused_experts import fused, fused_names
from megadpo.checkpoint.hf import INDEX_NAME, SINGLE_NAME
from megadpo.checkpoint.integrity import FileRecord, record_of
from megadpo.checkpoint.passthrough import write_passthrough
from megadpo.checkpoint.staging import publish, staging, writing
from megadpo.checkpoint.tensor_file import write_tensor_file
from megadpo.model.families import (
    HEAD,
    ParameterShard,
    family_of,
    head_settings,
    is_correction_bias,
    logical_shapes,
    shape_of,
    tying_settings,
)
from megadpo.model.shape import Fused

if TYPE_CHECKING:
    from transformers import PretrainedConfig


ONLY_NAME = "model-00001-of-00001.safetensors"
"""Of the one file of a model that has others beside it."""


@dataclass(frozen=True)
class ExportPlan:
    """Which tensor goes to which file.

    Attributes:
        files: file name -> names of its tensors. A file's tensors all belong to one chunk of a pipeline stage.
        shapes: logical name -> shape.
        dtypes: logical name -> type in the file.
        config: what config.json must say: architectures and dtype; of a reward model, its label and padding token too.
        fused_experts: how the files have all experts of a layer as one tensor; None: they do not.
    """

    files: dict[str, tuple[str, ...]]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    config: dict[str, Any]
    fused_experts: Fused | None = None

    def in_file(self, file: str) -> list[str]:
        """Names of the tensors that a file has."""
        return fused_names(self.files[file]) if self.fused_experts is not None else list(self.files[file])


def plan_export(
    hf_config: PretrainedConfig,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    stages: Sequence[range] | None = None,
    max_shard_bytes: float = 5e9,
) -> ExportPlan:
    """Assign every tensor of the model to a file.

    Args:
        dtype: of all tensors but routers' correction biases, which are float32 then, as transformers keeps them; or of each
            by logical name.
        stages: global layer numbers of each chunk of the pipeline stages, in the model's order; None = one. The
            embedding goes with the first, final norm and head with the last.
        max_shard_bytes: files stay below it, but a layer is never torn apart.
    """
    shape = shape_of(hf_config)
    shapes = logical_shapes(shape)
    dtypes = {name: kept_dtype(name, dtype) if isinstance(dtype, torch.dtype) else dtype[name] for name in shapes}
    stages = stages or [range(shape.num_layers)]
    bundles: list[list[str]] = []
    for stage in range(len(stages)):
        bundles += _pack(_groups_of_stage(shapes, stages, stage), shapes, dtypes, max_shard_bytes)
    if len(bundles) == 1:
        files = {SINGLE_NAME: tuple(bundles[0])}
    else:
        count = len(bundles)
        files = {f"model-{i:05d}-of-{count:05d}.safetensors": tuple(names) for i, names in enumerate(bundles, 1)}
    config = {
        "architectures": list(hf_config.architectures or family_of(hf_config).architectures),
        "dtype": str(next(iter(dtypes.values()))).removeprefix("torch."),
        **head_settings(hf_config),
    }
    return ExportPlan(files, shapes, dtypes, config, None if shape.experts is None else shape.experts.fused)


def kept_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type of the tensor with this logical name in a model whose type is `dtype`."""
    return torch.float32 if is_correction_bias(name) else dtype


def _groups_of_stage(shapes: Mapping[str, Any], stages: Sequence[range], stage: int) -> Iterator[list[str]]:
    """Names of a stage's embedding, of each of its layers, and of its norm and head."""
    ends = [name for name in shapes if not name.startswith("model.layers.")]
    if stage == 0:
        yield ends[:1]
    for layer in stages[stage]:
        yield [name for name in shapes if name.startswith(f"model.layers.{layer}.")]
    if stage == len(stages) - 1:
        yield ends[1:]


def _pack(
    groups: Iterable[list[str]],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    max_bytes: float,
) -> list[list[str]]:
    bundles: list[list[str]] = []
    used = 0
    for names in groups:
        size = sum(prod(shapes[name]) * dtypes[name].itemsize for name in names)
        if not bundles or used + size > max_bytes:
            bundles.append([])
            used = 0
        bundles[-1] += names
        used += size
    return bundles


def write_export_files(plan: ExportPlan, directory: Path, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, FileRecord]:
    """Write the files whose tensors this process has; each is written and dropped once its last tensor has come.

    In layer order, no more than about one file's tensors are in memory.

    Args:
        directory: the final directory; the files go to its staging directory, see `staging.begin`.
        tensors: (logical name, whole tensor), any type and device.

    Returns:
        The record of each file written.

    Raises:
        ValueError: a tensor the plan does not know or of another shape, or a file that stays incomplete.
        UserError: the disk refuses.
    """
    file_of = {name: file for file, names in plan.files.items() for name in names}
    waiting: dict[str, dict[str, Tensor]] = {}
    written: dict[str, FileRecord] = {}
    for name, tensor in tensors:
        if name not in file_of or tuple(tensor.shape) != plan.shapes[name]:
            raise ValueError(f"tensor {name} of shape {tuple(tensor.shape)} is not in the export's plan")
        file = file_of[name]
        bundle = waiting.setdefault(file, {})
        bundle[name] = tensor.detach().to("cpu", plan.dtypes[name]).contiguous()
        if len(bundle) == len(plan.files[file]):
            del waiting[file]
            whole = {name: bundle.pop(name) for name in plan.files[file]}
            whole = whole if plan.fused_experts is None else fused(whole, plan.fused_experts)
            written[file] = write_tensor_file(whole, staging(directory) / file)
            del bundle, whole
    if waiting:
        file, bundle = next(iter(waiting.items()))
        raise ValueError(f"{file} is incomplete: {sorted(set(plan.files[file]) - bundle.keys())[0]} did not come")
    return written


def finish_export(plan: ExportPlan, directory: Path, hf_source: str | Path | Companions) -> None:
    """Write index and config, tokenizer, generation config and chat template, and give the directory its name.

    Args:
        hf_source: the companions of the model that training began with, or its directory, or one of our checkpoints.

    Raises:
        ValueError: a planned file was not written.
        UserError: the disk is full or refuses.
    """
    partial, companions = staging(directory), companions_of(hf_source)
    missing = [file for file in plan.files if not (partial / file).is_file()]
    if missing:
        raise ValueError(f"{missing[0]} was not written")
    weight_map = {name: file for file in plan.files for name in plan.in_file(file)}
    total = sum(prod(shape) * plan.dtypes[name].itemsize for name, shape in plan.shapes.items())
    if companions.passthrough is not None:
        if len(plan.files) == 1:  # beside a file of this name no index is looked at
            with writing(partial / ONLY_NAME):
                (partial / SINGLE_NAME).rename(partial / ONLY_NAME)
            weight_map = dict.fromkeys(weight_map, ONLY_NAME)
        weight_map |= write_passthrough(companions.passthrough, partial)
        total += companions.passthrough.num_bytes()
    if len(set(weight_map.values())) > 1:
        write_json(partial / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    settings = dict(companions.settings)
    # Older readers know torch_dtype only, newer ones prefer dtype: whichever the model came with stays.
    spellings = [key for key in ("dtype", "torch_dtype") if key in settings] or ["dtype"]
    settings |= dict.fromkeys(spellings, plan.config["dtype"])
    settings |= {key: value for key, value in plan.config.items() if key != "dtype"}
    settings |= tying_settings(settings, has_own_head=HEAD in plan.shapes)
    write_json(partial / "config.json", settings)
    write_companions(companions, partial)
    publish(directory)


def write_json(path: Path, content: dict[str, Any]) -> FileRecord:
    """An indented JSON file ending in a newline; the record of its bytes."""
    text = (json.dumps(content, indent=2) + "\n").encode()
    with writing(path):
        path.write_bytes(text)
    return record_of(text)


@dataclass(frozen=True)
class LogicalSlice:
    """Elements ``[start, start + values.shape[dim])`` along `dim` of a logical tensor."""

    name: str
    dim: int
    start: int
    values: Tensor


def logical_slices(shard: ParameterShard, tensor: Tensor) -> list[LogicalSlice]:
    """A shard's values in logical terms; pieces that follow each other in a logical tensor come as one slice.

    Args:
        tensor: the local parameter [shard.shape], or a moment of it.
    """
    assert tuple(tensor.shape) == shard.shape, (shard.name, tuple(tensor.shape), shard.shape)
    runs: list[tuple[str, int, int, list[Tensor]]] = []
    for piece in sorted(shard.pieces, key=lambda piece: (piece.logical_name, piece.logical_start)):
        values = tensor.detach().narrow(piece.dim, piece.local_start, piece.length)
        if runs:
            name, dim, start, parts = runs[-1]
            end = start + sum(part.shape[dim] for part in parts)
            if (name, dim, end) == (piece.logical_name, piece.dim, piece.logical_start):
                parts.append(values)
                continue
        runs.append((piece.logical_name, piece.dim, piece.logical_start, [values]))
    return [LogicalSlice(name, dim, start, torch.cat(parts, dim)) for name, dim, start, parts in runs]


def join_tensor_ranks(parts: Sequence[tuple[ParameterShard, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Whole logical tensors from one parameter's shards on all tensor ranks (just one of a replicated parameter)."""
    slices: dict[str, list[LogicalSlice]] = {}
    for shard, tensor in parts:
        for part in logical_slices(shard, tensor):
            slices.setdefault(part.name, []).append(part)
    for name, found in slices.items():
        found.sort(key=lambda part: part.start)
        yield name, torch.cat([part.values for part in found], found[0].dim)
