"""Weights that torch.save has written (``pytorch_model.bin``): the one place where a pickle is read, and how it is guarded.

torch's restricted unpickler (``weights_only=True``) builds tensors, and containers of them, and refuses everything else. The
file is mapped, so that only what is read of a tensor comes into memory.
"""

from __future__ import annotations

import pickle
import zipfile
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from megadpo.errors import UserError


class TorchFile:
    """One file of named tensors, read on first use. The same methods as `SafetensorsFile`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        if not self.path.is_file():
            raise UserError(f"{self.path} is missing; copy or download the model again")
        content = load_tensors(self.path)
        if not isinstance(content, dict) or not content:
            raise UserError(f"{self.path} holds a {type(content).__name__}, not tensors by name; {_INSTEAD}")
        for name, value in content.items():
            if not isinstance(name, str) or not _is_plain(value):
                raise UserError(f"{self.path}: {name!r} is no plain tensor in it; {_INSTEAD}")
        return content

    @cached_property
    def keys(self) -> frozenset[str]:
        """Names of the tensors in the file."""
        return frozenset(self._tensors)

    def check(self, key: str) -> None:
        """Raise UserError where the file does not have the tensor."""
        if key not in self._tensors:
            raise UserError(f"{self.path} has no tensor {key}, which its index promises; get the model again")

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        """Type of a tensor."""
        return self._tensors[key].dtype

    def read(self, key: str, dim: int, start: int, length: int) -> Tensor:
        """Elements ``[start, start + length)`` along `dim`, mapped."""
        return self._tensors[key].detach().narrow(dim, start, length)

    def release(self) -> None:
        """Unmap the file; reading maps it again."""
        self.__dict__.pop("_tensors", None)


_INSTEAD = "save the model by transformers' save_pretrained, which writes safetensors"


def load_tensors(path: Path) -> object:
    """What a file of torch.save's holds, as torch's restricted unpickler builds it, mapped.

    Raises:
        UserError: damaged, of a torch before 1.6, or holding anything but tensors in containers: nothing of it is run.
    """
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is truncated, or was written by a torch before 1.6, and is not read; {_INSTEAD}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is a pickle that holds more than tensors, so it was not read; {_INSTEAD}") from error
    except Exception as error:  # what a damaged archive makes torch raise is of many kinds
        raise UserError(f"{path} is damaged, or no file of tensors ({type(error).__name__}); get it again") from error


def _is_plain(value: object) -> bool:
    kinds = (Tensor, torch.nn.Parameter)
    return type(value) in kinds and isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized
