"""What a directory is, in facts: a Hugging Face model, an adapter, one of our checkpoints, a checkpoint of Megatron-core."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch

from megadpo.checkpoint.companions import companion_files
from megadpo.checkpoint.hf import directory_warning, hf_directory, open_hf, read_hf_config, read_json
from megadpo.checkpoint.no_directory import why_no_model
from megadpo.checkpoint.peft import adapter_files, is_peft_directory
from megadpo.checkpoint.peft_settings import CONFIG_NAME
from megadpo.checkpoint.peft_tensors import weights_file
from megadpo.checkpoint.sharded import is_checkpoint, open_checkpoint
from megadpo.checkpoint.torch_dist import TorchDistFiles, torch_dist_directory
from megadpo.errors import UserError
from megadpo.model.families import family_of, mtp_names, shape_of

Tensors = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and type by name."""


_OF_ADAPTERS = ("base_model_name_or_path", "peft_type", "task_type", "r", "lora_alpha", "target_modules", "use_dora")


def describe(path: str | Path) -> tuple[dict[str, Any], Tensors]:
    """Facts of a directory, JSON-able, and its tensors.

    Raises:
        UserError: it is none of the above, or damaged.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"{path} is no directory{f': {what}' if (what := why_no_model(path)) else ''}")
    if is_checkpoint(directory):
        return _of_checkpoint(directory)
    if is_peft_directory(directory):
        return _of_adapter(directory)
    if (inner := torch_dist_directory(directory)) is not None:
        files = TorchDistFiles(inner)
        tensors = {name: (tensor.shape, tensor.dtype) for name, tensor in files.tensors.items()}
        chunks = sum(len(tensor.chunks) for tensor in files.tensors.values())
        return {"is": "checkpoint of Megatron-core (torch_dist)", "at": str(inner), "chunks": chunks} | _sizes(
            tensors
        ), tensors
    return _of_model(directory)


def _of_model(directory: Path) -> tuple[dict[str, Any], Tensors]:
    config = read_hf_config(directory)
    source = open_hf(directory)
    tensors = {name: (source.shape(name), source.dtype(name)) for name in source.names()}
    passed_on = mtp_names(config.num_hidden_layers, tensors)
    facts: dict[str, Any] = {"is": "Hugging Face model"} | _of_config(directory)
    facts |= _sizes(tensors) | {"multi-token prediction": len(passed_on)}
    facts |= {"beside the weights": sorted(companion_files(directory))}
    warning = directory_warning(directory)
    return facts if warning is None else facts | {"warning": warning}, tensors


def _of_config(path: Path) -> dict[str, Any]:
    config = read_hf_config(path)
    shape = shape_of(config)
    facts: dict[str, Any] = {"family": family_of(config).name, "architectures": list(config.architectures or ())}
    facts |= {"layers": shape.num_layers, "hidden size": shape.hidden_size, "vocabulary": shape.vocab_size}
    facts |= {"heads": shape.num_heads, "heads of keys and values": shape.num_key_value_heads}
    facts |= {"tied embeddings": shape.tied_embeddings, "head": shape.head}
    return facts if shape.experts is None else facts | {"experts": shape.experts.count}


def _of_adapter(directory: Path) -> tuple[dict[str, Any], Tensors]:
    settings, file = read_json(directory / CONFIG_NAME), weights_file(directory)
    tensors = {name: (file.shape(name), file.dtype(name)) for name in sorted(file.keys)}
    facts = {"is": "adapter (PEFT)"} | {key: settings[key] for key in _OF_ADAPTERS if key in settings}
    return facts | _sizes(tensors) | {"files": [path.name for path in adapter_files(directory)]}, tensors


def _of_checkpoint(directory: Path) -> tuple[dict[str, Any], Tensors]:
    checkpoint = open_checkpoint(directory)
    source = checkpoint.source("weights")
    tensors = {name: (source.shape(name), source.dtype(name)) for name in source.names()}
    facts: dict[str, Any] = {"is": "checkpoint of megadpo"} | _of_config(directory)
    facts |= {key: checkpoint.state[key] for key in ("step", "num_steps", "dtype") if key in checkpoint.state}
    facts |= {"adapter": "adapter" in checkpoint.state, "kinds": list(checkpoint.kinds)}
    facts |= {"files": len(checkpoint.files or ()), "beside the weights": sorted(companion_files(hf_directory(directory)))}
    return facts | _sizes(tensors), tensors


def _sizes(tensors: Tensors) -> dict[str, Any]:
    bytes_of: Counter[str] = Counter()
    for shape, dtype in tensors.values():
        bytes_of[str(dtype).removeprefix("torch.")] += prod(shape) * dtype.itemsize
    return {
        "tensors": len(tensors),
        "parameters": sum(prod(shape) for shape, _ in tensors.values()),
        "bytes": dict(bytes_of),
    }


def lines(facts: dict[str, Any], tensors: Tensors | None = None) -> Iterable[str]:
    """The same for people; with every tensor where these are given."""
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {count:,}" for name, count in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        yield f"{key}: {value}"
    for name, (shape, dtype) in (tensors or {}).items():
        yield f"{name}  {list(shape)}  {str(dtype).removeprefix('torch.')}"
