"""Hugging Face model directories, read: the config, and any slice of any tensor straight from safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megadpo.checkpoint.file_names import BIN_INDEX_NAME, BIN_NAME, INDEX_NAME, SINGLE_NAME
from megadpo.checkpoint.fp8 import Fp8Source, check_block_fp8, is_block_fp8
from megadpo.checkpoint.fused_experts import SingleExperts
from megadpo.checkpoint.no_directory import why_no_model
from megadpo.checkpoint.torch_file import TorchFile
from megadpo.errors import UserError, reason
from megadpo.model.families import FAMILIES, TensorSource, family_of, shape_of
from megadpo.model.families.registry import as_config
from megadpo.model.shape import Fused

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MAX_JSON_BYTES = 1 << 30
MAPPED_BYTES = 32 << 20

_LFS = b"version https://git-lfs"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsFile:
    """One safetensors file, memory-mapped on first use."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _file(self) -> Any:
        if not self.path.is_file():
            raise UserError(f"{self.path} is missing; copy or download the model again")
        try:
            return safe_open(str(self.path), framework="pt")
        except (SafetensorError, OSError) as error:
            if _is_lfs_pointer(self.path):
                raise UserError(
                    f"{self.path} is a pointer of Git LFS and not the file itself; fetch it by `git lfs pull`"
                ) from error
            raise UserError(f"{self.path} is truncated or no safetensors file ({error}); get it again") from error

    @cached_property
    def keys(self) -> frozenset[str]:
        """Names of the tensors in the file."""
        return frozenset(self._file.keys())

    def metadata(self) -> dict[str, str]:
        """The texts in the file's head."""
        return dict(self._file.metadata() or {})

    def slice(self, key: str) -> Any:
        """safetensors' lazy view of a tensor.

        Raises:
            UserError: the file does not have it.
        """
        if key not in self.keys:
            raise UserError(f"{self.path} has no tensor {key}, which its index promises; get the model again")
        return self._file.get_slice(key)

    def check(self, key: str) -> None:
        """Raise UserError where the file does not have the tensor."""
        self.slice(key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self.slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        """Type of a tensor.

        Raises:
            UserError: a type that torch has no name for here.
        """
        name = self.slice(key).get_dtype()
        if name not in DTYPES:
            raise UserError(f"{self.path}: tensor {key} has type {name}, which is not supported")
        return DTYPES[name]

    def read(self, key: str, dim: int, start: int, length: int) -> Tensor:
        """Elements ``[start, start + length)`` along `dim`; the rest of the tensor is not read."""
        view = self.slice(key)
        assert start >= 0 and start + length <= view.get_shape()[dim], (key, dim, start, length)
        return view[(slice(None),) * dim + (slice(start, start + length),)]

    def release(self) -> None:
        """Unmap the file, whose pages count as this process's memory; reading maps it again."""
        self.__dict__.pop("_file", None)


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS


class _HfSource:
    """A TensorSource on files that hold whole logical tensors.

    Args:
        keep_mapped: files stay mapped once they are opened, so that they can be read when their directory has gone; else
            they are unmapped whenever MAPPED_BYTES were read, as what is read of them counts as this process's memory.
    """

    def __init__(self, files: Mapping[str, SafetensorsFile | TorchFile], keep_mapped: bool = False) -> None:
        self._files, self._keep_mapped, self._num_mapped = files, keep_mapped, 0

    def names(self) -> Iterable[str]:
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._files[name].dtype(name)

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        values = self._files[name].read(name, dim, start, length)
        # Along another axis than the first, pages of the whole tensor are looked at.
        self._num_mapped += values.nbytes if dim == 0 else values.element_size() * prod(self.shape(name))
        if self._num_mapped > MAPPED_BYTES and not self._keep_mapped:
            self.release()
        return values

    def release(self) -> None:
        self._num_mapped = 0
        for file in set(self._files.values()):
            file.release()


def open_hf(path: str | Path, keep_mapped: bool = False) -> TensorSource:
    """The weights of a Hugging Face directory: ``model.safetensors``, or files named by an index; else the same of
    ``pytorch_model.bin``. Those in FP8 with scales, and experts in MXFP4, are read as plain ones.

    Of a directory that has several of these the first is read, which is transformers' choice. What files hold beside the
    tensors that their index names is not read.

    Args:
        keep_mapped: what has been opened can be read when the directory has gone.

    Raises:
        UserError: no weights, an index that names a missing file or one outside of the directory, a damaged file, a pickle
            of more than tensors.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"model.path {directory} is not a directory; give a Hugging Face model directory")
    source = _HfSource(_files_of(directory), keep_mapped)
    settings = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    order = _fused_experts(settings)
    if order is not None:
        return SingleExperts(source, order)
    return Fp8Source(source, settings) if is_block_fp8(settings) else source


def _files_of(directory: Path) -> Mapping[str, SafetensorsFile | TorchFile]:
    """The file of each tensor."""
    if (directory / SINGLE_NAME).is_file():
        file = SafetensorsFile(directory / SINGLE_NAME)
        return dict.fromkeys(file.keys, file)
    if (directory / INDEX_NAME).is_file():
        return _files_of_index(directory, INDEX_NAME, SafetensorsFile)
    if (directory / BIN_NAME).is_file():
        pickled = TorchFile(directory / BIN_NAME)
        return dict.fromkeys(pickled.keys, pickled)
    if (directory / BIN_INDEX_NAME).is_file():
        return _files_of_index(directory, BIN_INDEX_NAME, TorchFile)
    if any(directory.glob("*.bin")) or any(directory.glob("*.pth")):
        raise UserError(
            f"{directory} has its weights in pickles that are not {BIN_NAME}, which megadpo does not open; load it in "
            "transformers and call save_pretrained to get safetensors"
        )
    what = why_no_model(directory)
    more = f"; {what}" if what else ""
    raise UserError(f"{directory} has no weights: neither {SINGLE_NAME} nor {INDEX_NAME} is there{more}")


def _fused_experts(settings: dict[str, Any]) -> Fused | None:
    families = [family for family in FAMILIES if family.name == settings.get("model_type")]
    experts = families[0].experts(as_config(settings)) if families else None
    return None if experts is None else experts.fused


def _files_of_index(
    directory: Path, index_name: str, kind: type[SafetensorsFile] | type[TorchFile]
) -> dict[str, SafetensorsFile | TorchFile]:
    weight_map = read_json(directory / index_name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{directory / index_name} has no weight_map; get the model again")
    end = ".safetensors" if kind is SafetensorsFile else ".bin"
    files: dict[str, SafetensorsFile | TorchFile] = {}
    for file_name in sorted(set(map(str, weight_map.values()))):
        files[file_name] = kind(file_inside(directory, file_name, index_name, end))
    sources = {name: files[str(file_name)] for name, file_name in weight_map.items()}
    for name, file in sources.items():
        file.check(name)
    return sources


def directory_warning(path: str | Path) -> str | None:
    """What is odd about the files of a model directory that is no reason to refuse it; None where nothing is."""
    found = [words for words in (_weights_warning(Path(path)), _code_warning(hf_directory(path) / "config.json")) if words]
    return "; ".join(found) or None


def _code_warning(file: Path) -> str | None:
    if not file.is_file() or not read_json(file).get("auto_map"):
        return None
    return (
        f"{file} names code of the model's own (auto_map), which is never run: the model is transformers' own of this kind"
    )


def _weights_warning(directory: Path) -> str | None:
    if not any((directory / name).is_file() for name in (SINGLE_NAME, INDEX_NAME)):
        is_pickled = any((directory / name).is_file() for name in (BIN_NAME, BIN_INDEX_NAME))
        return _words_of_pickle(directory) if is_pickled else None
    if not (directory / INDEX_NAME).is_file():
        return None
    index = read_json(directory / INDEX_NAME)
    if (directory / SINGLE_NAME).is_file():
        weight_map = index.get("weight_map")
        names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        return None if names == {SINGLE_NAME} else _words_of_both(directory)
    return _size_warning(directory, index.get("metadata"))


def _words_of_both(directory: Path) -> str:
    return (
        f"{directory} has its weights twice, in {SINGLE_NAME} and in the files of {INDEX_NAME}: the former is read, as by "
        "transformers; remove the one that is stale"
    )


def _words_of_pickle(directory: Path) -> str:
    return (
        f"{directory} has its weights as a pickle ({BIN_NAME}): it is read by torch's restricted unpickler, which builds "
        "tensors and nothing else; safetensors need no such guard (`megadpo convert` writes them)"
    )


def _size_warning(directory: Path, metadata: Any) -> str | None:
    """Tensors of another size than the index says: tools that merge or cut models leave `total_size` as it was."""
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    if type(said) is not int:
        return None
    source = _HfSource(_files_of(directory))
    found = sum(prod(source.shape(name)) * source.dtype(name).itemsize for name in source.names())
    if found == said:
        return None
    return f"{directory / INDEX_NAME} says that the tensors have {said:,} bytes, but they have {found:,}: is a file stale?"


def file_inside(directory: Path, name: str, named_by: str, end: str = ".safetensors") -> Path:
    """The path of a file that an index names: a plain file name with the right ending.

    Raises:
        UserError: any other name, such as one with ``../``.
    """
    if name != Path(name).name or name.startswith(".") or "\\" in name or not name.endswith(end):
        raise UserError(f"{directory / named_by} names the file {name!r}; only {end} files beside it are read")
    return directory / name


def hf_directory(path: str | Path) -> Path:
    """Where config and tokenizer of `path` are: itself, or the ``huggingface/`` of one of our checkpoints."""
    directory = Path(path)
    return directory / "huggingface" if (directory / "checkpoint.json").is_file() else directory


def is_quantised(path: str | Path) -> bool:
    """Whether a model directory has weights that are packed in fewer bits and cannot be read as plain ones."""
    file = hf_directory(path) / "config.json"
    settings = read_json(file) if file.is_file() else {}
    return bool(settings.get("quantization_config")) and not _can_be_read(settings)


def read_hf_config(path: str | Path) -> PretrainedConfig:
    """The transformers config of a Hugging Face directory or of one of our checkpoints. No code of the model's runs.

    Raises:
        UserError: no such directory or config, an unsupported architecture, a classifier of several labels, quantised
            weights, values that transformers refuses.
    """
    if not Path(path).is_dir():
        what = why_no_model(path) or "give a Hugging Face model directory or a checkpoint"
        raise UserError(f"{path} (model.path) is not a directory; {what}")
    file = hf_directory(path) / "config.json"
    if not file.is_file():
        known = why_no_model(path)
        raise UserError(f"{file} is missing; {path} is not a Hugging Face model directory{f': {known}' if known else ''}")
    settings = read_json(file)
    try:
        family_of(settings)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    if settings.get("quantization_config") and not _can_be_read(settings):
        raise UserError(
            f"{file} has quantization_config, which is not supported: weights must be plain, not in 4 or 8 bits; give the "
            "model that they were made from, in bf16 or fp32"
        )
    from transformers import AutoConfig

    try:
        if is_block_fp8(settings):
            check_block_fp8(settings)
        config = AutoConfig.from_pretrained(str(file.parent), trust_remote_code=False, local_files_only=True)
        # Both are of the files: what is read is plain, and by transformers' own model.
        for field in ("quantization_config", "auto_map"):
            config.__dict__.pop(field, None)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except Exception as error:  # transformers' validators raise several kinds
        raise UserError(f"{file}: transformers refuses it: {reason(error, limit=None)}") from error
    try:
        shape_of(config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except (ArithmeticError, TypeError, ValueError) as error:  # such as a factor that is null, or a divisor of 0
        raise UserError(f"{file} has a value that makes no model: {reason(error, limit=None)}") from error
    return config


def _can_be_read(settings: dict[str, Any]) -> bool:
    """Whether weights in fewer bits are those that `open_hf` reads as plain ones."""
    method = settings["quantization_config"]
    is_mxfp4 = isinstance(method, dict) and method.get("quant_method") == "mxfp4"
    return _fused_experts(settings) == "in_turns" if is_mxfp4 else is_block_fp8(settings)


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        UserError: missing, huge, not UTF-8, not JSON, or no object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path} is larger than {MAX_JSON_BYTES} bytes; that is no index or config")
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    return parse_json(text, path)


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """An object from the bytes of the JSON file `path`.

    Raises:
        UserError: not UTF-8, not JSON, or no object.
    """
    try:
        content = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content
