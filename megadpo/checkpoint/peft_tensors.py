"""The tensors of a PEFT directory, by the names that they have inside megadpo."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megadpo.checkpoint.hf import SafetensorsFile
from megadpo.checkpoint.merged import ROWS_AT_A_TIME
from megadpo.checkpoint.peft_settings import CONFIG_NAME, WEIGHTS_NAME
from megadpo.errors import UserError
from megadpo.model.adapters.spec import EMBEDDING_MODULE, HEAD_MODULE, AdapterSpec, all_shapes
from megadpo.model.families import HEAD, TensorSource
from megadpo.model.families.common import EMBEDDING
from megadpo.model.shape import ModelShape

PICKLE_NAME = "adapter_model.bin"
PREFIX = "base_model.model."


def weights_file(directory: Path) -> SafetensorsFile:
    if (directory / WEIGHTS_NAME).is_file():
        return SafetensorsFile(directory / WEIGHTS_NAME)
    if (directory / PICKLE_NAME).is_file():
        raise UserError(
            f"{directory} has its adapter as a pickle ({PICKLE_NAME}) only, which megadpo does not open; load it with "
            "peft.PeftModel.from_pretrained and call save_pretrained to get safetensors"
        )
    raise UserError(f"{directory} has no {WEIGHTS_NAME}; copy or download the adapter again")


def leave_out_tied_head(file: SafetensorsFile, names: dict[str, str]) -> None:
    """PEFT writes a tied embedding that is trained whole twice."""
    tensors = [file.read(names[name], 0, 0, file.shape(names[name])[0]) for name in (HEAD, EMBEDDING) if name in names]
    if len(tensors) < 2 or not torch.equal(*tensors):
        raise UserError(
            f"{file.path} has a head of its own ({names[HEAD]}), but the model's is the embedding (tie_word_embeddings); "
            "save the adapter with ensure_weight_tying=True"
        )
    del names[HEAD]


def own_name(key: str, path: Path) -> str:
    """The name inside megadpo of a tensor of the file."""
    if not key.startswith(PREFIX):
        raise UserError(f"{path}: tensor {key} has no name of PEFT's (they begin with {PREFIX}); save it with PEFT")
    return key.removeprefix(PREFIX)


def take_copies(names: dict[str, str]) -> dict[str, str]:
    """Take weights of the base itself out of `names`: their keys by the names of the base's tensors."""
    found = {}
    for module in (EMBEDDING_MODULE, HEAD_MODULE):
        copy, weight = f"{module}.base_layer.weight", f"{module}.weight"
        if copy in names and weight not in names:
            found[weight] = names.pop(copy)
    return found


def check_copies(file: SafetensorsFile, copies: Mapping[str, str], spec: AdapterSpec, shape: ModelShape) -> None:
    """Raises UserError for weights of the base itself where PEFT writes none, or of another size."""
    for name, key in copies.items():
        if name.removesuffix(".weight") not in spec.modules or file.shape(key) != all_shapes(shape)[name]:
            raise UserError(
                f"{file.path} has weights of the base itself ({key}), which fit neither an adapter of the same module nor "
                "the model; save it with save_embedding_layers=False"
            )


def check_tensors(file: SafetensorsFile, names: Mapping[str, str], expected: Mapping[str, tuple[int, ...]]) -> None:
    for name, size in expected.items():
        if name not in names:
            raise UserError(f"{file.path} has no tensor {PREFIX}{name}, which its {CONFIG_NAME} asks for; get it again")
        if file.shape(names[name]) != size:
            raise UserError(
                f"{file.path}: tensor {names[name]} has shape {list(file.shape(names[name]))}, but with this model and the "
                f"rank of its {CONFIG_NAME} it has {list(size)}; the adapter belongs to another model or is damaged"
            )
        if not file.dtype(names[name]).is_floating_point or file.dtype(names[name]).itemsize < 2:
            raise UserError(f"{file.path}: tensor {names[name]} is {file.dtype(names[name])}, which is not supported")
    surplus = sorted(names.keys() - expected.keys())
    if surplus:
        raise UserError(
            f"{file.path} has the tensor {names[surplus[0]]}, of which its {CONFIG_NAME} says nothing; get the adapter again"
        )


class PeftSource:
    """A TensorSource on an adapter's file.

    Args:
        names: the keys of the file by our names.
        copies: keys of weights of the base itself, as PEFT writes them where embedding or head have an adapter, by the
            names of the base's tensors. They are not read from here.
    """

    def __init__(self, file: SafetensorsFile, names: Mapping[str, str], copies: Mapping[str, str]) -> None:
        self._file, self._names, self._copies = file, names, copies

    def names(self) -> Iterable[str]:
        return self._names.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._file.dtype(self._names[name])

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        return self._file.read(self._names[name], dim, start, length)

    def release(self) -> None:
        self._file.release()

    def other_than(self, base: TensorSource) -> str | None:
        """The key of a copy that is not the base's tensor, nor that rounded to the copy's type; some rows in memory at a
        time."""
        for name, key in self._copies.items():
            size, own_name = self._file.shape(key), name if name in base.names() else EMBEDDING
            if base.shape(own_name) != size:
                return key
            for first in range(0, size[0], ROWS_AT_A_TIME):
                rows = (first, min(ROWS_AT_A_TIME, size[0] - first))
                copy = self._file.read(key, 0, *rows)
                if not torch.equal(base.read(own_name, 0, *rows).to(copy.dtype), copy):
                    return key
        return None
