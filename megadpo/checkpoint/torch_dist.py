"""Files of torch.distributed.checkpoint as Megatron-core's ``torch_dist`` has them: global tensors by name, in chunks.

::

    iter_0000100/
        .metadata        a pickle: size, type and chunks of every tensor, and where in which file each chunk lies
        __0_0.distcp     what torch.save wrote of one chunk after the other
        common.pt        what is not sharded (arguments, iteration); not read
        metadata.json    {"sharded_backend": "torch_dist", …}

``.metadata`` is unpickled with a list of the classes that it may name, for each of which it gets a stand-in that only keeps
what it is given; a chunk by torch's restricted unpickler. Nothing else of a directory is opened.
"""

from __future__ import annotations

import functools
import io
import pickle
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadpo.checkpoint.hf import MAX_JSON_BYTES, read_json
from megadpo.errors import UserError

METADATA, CONFIG, COMMON, DATA = ".metadata", "metadata.json", "common.pt", "__0_0.distcp"
LATEST = "latest_checkpointed_iteration.txt"
CHUNKS_IN_MEMORY = 2
MOST_DIGITS = 20


def torch_dist_directory(path: str | Path) -> Path | None:
    """The directory with ``.metadata`` that `path` is, or whose last iteration it names; None: it is no such checkpoint."""
    directory = Path(path)
    if (directory / METADATA).is_file():
        return directory
    try:
        word = (directory / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    is_number = word.isascii() and word.isdecimal() and len(word) < MOST_DIGITS
    name = "release" if word == "release" else f"iter_{int(word):07d}" if is_number else ""
    return directory / name if name and (directory / name / METADATA).is_file() else None


@dataclass(frozen=True)
class Chunk:
    """A part of a global tensor: `sizes` elements from `offsets` on, at bytes ``[start, start + length)`` of `file`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class GlobalTensor:
    """What a checkpoint has of one name."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


class TorchDistFiles:
    """An open checkpoint: its tensors by name, and any region of one of them.

    Raises:
        UserError: no such checkpoint, of another format, damaged, or with a pickle that names anything but what such files
            are made of.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if (directory / CONFIG).is_file():
            backend = read_json(directory / CONFIG).get("sharded_backend")
            if backend != "torch_dist":
                raise UserError(
                    f"{directory} is a checkpoint of Megatron-core in the format {backend!r}; only torch_dist is read: "
                    "convert it by Megatron-LM with --ckpt-format torch_dist"
                )
        self.tensors = _tensors_of(directory, _unpickled(directory / METADATA))
        self._by_first: dict[str, dict[int, list[Chunk]]] = {}
        self._chunk = functools.lru_cache(CHUNKS_IN_MEMORY)(self._read_chunk)

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A region of a tensor: `sizes` elements from `offsets` on, in every dimension.

        Raises:
            UserError: a chunk is missing or damaged.
        """
        whole = self.tensors[name]
        out = torch.empty(tuple(sizes), dtype=whole.dtype)
        num_found = 0
        for chunk in self._candidates(name, offsets[0], sizes[0]):
            low = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
            high = [min(a + m, b + n) for a, m, b, n in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                here = tuple(slice(a - b, c - b) for a, b, c in zip(low, offsets, high, strict=True))
                there = tuple(slice(a - b, c - b) for a, b, c in zip(low, chunk.offsets, high, strict=True))
                out[here] = self._chunk(name, chunk)[there]
                num_found += out[here].numel()
        if num_found != out.numel():
            raise UserError(f"{self.directory}: the chunks of {name} do not make it up; the checkpoint is damaged")
        return out

    def _candidates(self, name: str, start: int, length: int) -> Iterator[Chunk]:
        """The chunks that may have some of the first dimension's elements ``[start, start + length)``."""
        by_first = self._by_first.get(name)
        if by_first is None:  # of a stacked tensor there are as many as layers times experts times ranks
            by_first = self._by_first[name] = defaultdict(list)
            for chunk in self.tensors[name].chunks:
                by_first[chunk.offsets[0]].append(chunk)
        for first, chunks in by_first.items():
            if first < start + length and first + max(chunk.sizes[0] for chunk in chunks) > start:
                yield from chunks

    def _read_chunk(self, name: str, chunk: Chunk) -> Tensor:
        path = self.directory / chunk.file
        try:
            with path.open("rb") as file:
                file.seek(chunk.start)
                content = io.BytesIO(file.read(chunk.length))
            tensor = torch.load(content, map_location="cpu", weights_only=True)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}; copy the checkpoint again") from error
        except Exception as error:  # what damaged bytes make torch raise is of many kinds
            raise UserError(f"{path} is damaged at the tensor {name} ({type(error).__name__}); copy it again") from error
        dtype = self.tensors[name].dtype
        if type(tensor) is not Tensor or tuple(tensor.shape) != chunk.sizes or tensor.dtype is not dtype:
            raise UserError(f"{path}: {name} is not what {METADATA} says of it; the checkpoint is damaged")
        return tensor

    def release(self) -> None:
        """Let go of the chunks in memory."""
        self._chunk.cache_clear()


def _tensors_of(directory: Path, found: _Record) -> dict[str, GlobalTensor]:
    tensors = {}
    try:
        storage = {
            (str(index.field("fqn")), tuple(index.state.get("offset") or ())): place  # of what is no tensor there is none
            for index, place in found.field("storage_data").items()
        }
        for name, entry in found.field("state_dict_metadata").items():
            if type(entry).__name__ == "TensorStorageMetadata":
                chunks = tuple(_chunk_of(directory, storage, str(name), chunk) for chunk in entry.field("chunks"))
                dtype = entry.field("properties").field(0)  # of a tuple
                if not isinstance(dtype, torch.dtype):
                    raise TypeError(name)
                tensors[str(name)] = GlobalTensor(tuple(map(int, entry.field("size"))), dtype, chunks)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{directory / METADATA}: what it says of its tensors makes no sense; it is damaged") from error
    return tensors


def _chunk_of(directory: Path, storage: Mapping[tuple[str, tuple[int, ...]], Any], name: str, chunk: Any) -> Chunk:
    offsets, sizes = tuple(chunk.field("offsets")), tuple(chunk.field("sizes"))
    place = storage[name, offsets]
    file, start, length = (place.field(part) for part in ("relative_path", "offset", "length"))
    if type(file) is not str or "/" in file or "\\" in file or "\0" in file or not file.endswith(".distcp"):
        raise UserError(f"{directory / METADATA} names the file {file!r}; only .distcp files beside it are read")
    if not all(type(number) is int and number >= 0 for number in (*offsets, *sizes, start, length)):
        raise ValueError(name)
    if len(offsets) != len(sizes):
        raise ValueError(name)
    return Chunk(offsets, sizes, file, start, length)


_NAMES = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.planner": (
        *("SavePlan", "WriteItem", "TensorWriteData", "WriteItemType", "BytesIOWriteData"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
}
"""What a .metadata may name, by module. It gets stand-ins of these, which only keep what they are given."""
_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


class _Record:
    """What a stand-in was given: `state`, an object's attributes by name, or what it pickles in their place."""

    state: Any = None

    def __init__(self, *arguments: Any, **named: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        """Raises KeyError or TypeError where there is no such attribute."""
        return self.state[name]


class _Unpickler(pickle.Unpickler):
    """Makes records, sizes and types of numbers, and refuses every other name.

    A pickle may also write into what it names, a class too. So the classes are made for this one load, and nobody else
    has them; torch.Size and types of numbers cannot be written into.
    """

    def __init__(self, content: io.BytesIO) -> None:
        super().__init__(content)
        self.classes = {(module, name): type(name, (_Record,), {}) for module, names in _NAMES.items() for name in names}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.classes:
            return self.classes[module, name]
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"{module}.{name}")


def _unpickled(path: Path) -> _Record:
    """The record of the Metadata that a file holds."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path} is larger than {MAX_JSON_BYTES} bytes; that is no index")
        content = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is damaged, or names what no such file is made of ({error}); it was not read") from error
    except Exception as error:  # what damaged bytes make pickle raise is of many kinds
        raise UserError(f"{path} is damaged ({type(error).__name__}); copy the checkpoint again") from error
    if type(content).__name__ not in ("Metadata", "MCoreMetadata") or not isinstance(content, _Record):
        raise UserError(f"{path} holds no metadata of a distributed checkpoint; it is damaged")
    return content


def regions(shape: Sequence[int], dim: int, start: int, length: int) -> tuple[list[int], list[int]]:
    """Offsets and sizes of elements ``[start, start + length)`` along `dim`, whole along the others."""
    offsets, sizes = [0] * len(shape), list(shape)
    offsets[dim], sizes[dim] = start, length
    return offsets, sizes
