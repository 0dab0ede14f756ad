"""Paths that are given as a model and are none: recognised by their files, and answered with what to give."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
GIVE = "give a Hugging Face model directory (config.json, safetensors, tokenizer)"
CONFIGS = ("config.json", "adapter_config.json", "checkpoint.json")
"""Of a directory that can be given: a model's, an adapter's, one of our checkpoints."""


def why_no_model(path: str | Path) -> str | None:
    """What a path is that is no model directory, and what to give in its place; None where nothing is known of it.

    A file is any that is there; a directory one without a config.json.
    """
    path = Path(path)
    if path.is_file():
        return _file(path)
    if path.is_dir():
        return _directory(path)
    return None


def _file(path: Path) -> str:
    name = path.name.lower()
    beside = f"give the directory that it is in, {path.parent}"
    has_config = any((path.parent / config).is_file() for config in CONFIGS)
    if name.endswith(".gguf"):
        return f"it is a GGUF file, weights in the format of llama.cpp, which are not trained; {GIVE} that it was made from"
    if name.endswith(".safetensors"):
        return f"it is one file of a model; {beside if has_config else f'{GIVE}, the others are not beside it'}"
    if re.fullmatch(r"pytorch_model.*\.bin", name) and has_config:
        return f"it is one file of a model; {beside}"
    if name.endswith(PICKLES):
        has_tensors = has_config and any(path.parent.glob("*.safetensors"))
        saved = "save the model by transformers' save_pretrained, which writes safetensors, and give that directory"
        return f"it is a pickle, which could run code and is never read; {beside if has_tensors else saved}"
    if name.endswith(".nemo"):
        return f"it is an archive of NeMo; export it to Hugging Face by NeMo (llm.export_ckpt) and {GIVE}"
    return f"it is a file; {beside if has_config else GIVE}"


def _directory(path: Path) -> str | None:
    return next((found for look in _LOOKS if (found := look(path)) is not None), None)


def _run_of_ours(path: Path) -> str | None:
    if (path / "hf" / "config.json").is_file() or (path / "hf" / "adapter_config.json").is_file():
        return f"it is the directory of a run; the trained model is {path / 'hf'}"
    steps = [step for root in (path, path / "checkpoints") for step in _children(root, r"step_\d+") if _is_model(step)]
    return f"it holds checkpoints of a run; give one of them, such as {steps[-1]}" if steps else None


def _deepspeed(path: Path) -> str | None:
    inner = [path, *_children(path, r"global_step\d+")]
    names = ("mp_rank_*_model_states.pt", "zero_pp_rank_*", "bf16_zero_pp_rank_*")
    if not any(True for folder in inner for name in names for _ in folder.glob(name)):
        return None
    return (
        "it is a checkpoint of DeepSpeed; `python zero_to_fp32.py --safe_serialization`, which DeepSpeed writes beside it, "
        "makes safetensors of it: give a directory with these, config.json and the tokenizer"
    )


def _megatron(path: Path) -> str | None:
    iterations = _children(path, r"iter_\d+|mp_rank_\d+(_\d+)*|release")
    is_of_lm = bool(iterations) or (path / "latest_checkpointed_iteration.txt").is_file()
    if any((folder / ".metadata").is_file() for folder in (path, *iterations)):
        return (
            f"it is a distributed checkpoint of torch or Megatron (torch_dist); `megadpo convert import {path} OUT --config "
            "HF_DIR` makes a checkpoint of it that can be given, with config.json and tokenizer of HF_DIR"
        )
    if not is_of_lm:
        return None
    return (
        "it is a checkpoint of Megatron-LM in a format of its own; save it by Megatron-LM with --ckpt-format torch_dist, "
        "which `megadpo convert import` reads"
    )


def _checkpoints_of_transformers(path: Path) -> str | None:
    found = [folder for folder in _children(path, r"checkpoint-\d+") if _is_model(folder)]
    found.sort(key=lambda folder: int(folder.name.rpartition("-")[2]))
    return f"it holds checkpoints of transformers' Trainer; give one of them, such as {found[-1]}" if found else None


def _hub_cache(path: Path) -> str | None:
    found = [folder for folder in _children(path / "snapshots", r".+") if _is_model(folder)]
    return f"it is a folder of the Hub's cache; give the snapshot in it, {found[-1]}" if found else None


def _original_llama(path: Path) -> str | None:
    if not any(path.glob("consolidated.*.pth")):
        return None
    return f"it has Llama's weights as Meta gives them; {GIVE}, which the Hub has of the same model"


def _gguf(path: Path) -> str | None:
    file = next(iter(sorted(path.glob("*.gguf"))), None)
    if file is None:
        return None
    return f"it has a GGUF file, weights in the format of llama.cpp, which are not trained; {GIVE} that it was made from"


def _weights_alone(path: Path) -> str | None:
    if (path / "config.json").is_file():
        return None
    has_weights = any(True for name in ("*.safetensors", *(f"*{end}" for end in PICKLES)) for _ in path.glob(name))
    return "it has weights but no config.json; copy the model's config.json and tokenizer into it" if has_weights else None


_LOOKS: tuple[Callable[[Path], str | None], ...] = (
    *(_run_of_ours, _deepspeed, _megatron, _checkpoints_of_transformers),
    *(_hub_cache, _original_llama, _gguf, _weights_alone),
)


def _children(path: Path, pattern: str) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(child for child in path.iterdir() if re.fullmatch(pattern, child.name) and child.is_dir())


def _is_model(path: Path) -> bool:
    return any((path / config).is_file() for config in CONFIGS)
