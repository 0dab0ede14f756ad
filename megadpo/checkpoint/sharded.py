"""Our checkpoints: safetensors and JSON under logical names and global shapes; any layout reads what any other wrote.

::

    step_00000100/
        checkpoint.json              format, size and hash of every other file, state, and for each kind ("weights",
                                     "exp_avg", …) and logical tensor its shape, dtype and pieces: [file, key, dim, start,
                                     length]; first of all the hash of the rest of this file
        pp00-tp01-000.safetensors    what a writer holds, in files of bounded size
        huggingface/                 config.json and tokenizer: the directory stands alone

Written as ``step_00000100.tmp`` and renamed: `begin` (one process), `write_shard_file` (each writer), `commit` (one).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megadpo.checkpoint.companions import Companions, companions_of, write_companions
from megadpo.checkpoint.export import logical_slices, write_json
from megadpo.checkpoint.hf import DTYPES, SafetensorsFile, file_inside, open_hf, parse_json, read_hf_config
from megadpo.checkpoint.integrity import FileRecord, check_bytes, check_sizes, read_bytes, records_in
from megadpo.checkpoint.passthrough import PASSTHROUGH, Passthrough, passthrough_of
from megadpo.checkpoint.staging import begin, publish, staging, writing
from megadpo.checkpoint.tensor_file import write_tensor_file
from megadpo.errors import UserError
from megadpo.files import SEAL, is_sealed, sealed
from megadpo.model.families import ParameterShard, TensorSource, head_settings, logical_shapes, shape_of, tying_settings

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "Checkpoint",
    "begin",
    "commit",
    "companions_with_tensors",
    "is_checkpoint",
    "open_checkpoint",
    "open_weights",
    "passthrough_tensors",
    "step_checkpoints",
    "step_directories",
    "step_directory",
    "step_of",
    "write_shard_file",
]

FORMAT, VERSION = "megadpo-checkpoint", 2
WITHOUT_HASHES = 1
"""The version of older code, whose files have no hashes."""
INDEX, CONFIG = "checkpoint.json", "huggingface/config.json"
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


@dataclass(frozen=True)
class StoredPiece:
    """Elements ``[start, start + length)`` along `dim` of a logical tensor: the tensor `key` of `file`."""

    file: str
    key: str
    dim: int
    start: int
    length: int


def write_shard_file(
    directory: str | Path,
    writer_name: str,
    items: Iterable[tuple[str, ParameterShard, Tensor]],
    max_file_bytes: float = 2e9,
) -> dict[str, Any]:
    """Write one rank's tensors. Ranks that hold the same values may all pass them: only primary shards are written.

    Args:
        directory: the checkpoint's final directory, after `begin`.
        writer_name: unique among the writers, e.g. ``pp00-tp01``.
        items: (kind, shard, local tensor [shard.shape]); taken one after the other, so a generator saves memory. A tensor
            stays as it is until all are written.
        max_file_bytes: a file is closed, and its tensors dropped, once it is this large.

    Returns:
        A JSON-able manifest for `commit`.

    Raises:
        UserError: the disk is full or refuses. What is left of `items` is not taken.
    """
    files: dict[str, Any] = {}
    entries: list[dict[str, Any]] = []
    waiting: dict[str, Tensor] = {}
    num_files = 0

    def flush() -> None:
        nonlocal num_files
        if waiting:
            name = _file_name(writer_name, num_files)
            files[name] = write_tensor_file(waiting, staging(Path(directory)) / name).to_json()
            waiting.clear()
            num_files += 1

    for kind, shard, tensor in items:
        for part in logical_slices(shard, tensor) if shard.is_primary else []:
            key = f"{kind}/{part.name}/{part.start}"
            waiting[key] = part.values.to("cpu").contiguous()
            shape = list(part.values.shape)
            piece = StoredPiece(_file_name(writer_name, num_files), key, part.dim, part.start, shape[part.dim])
            dtype = str(tensor.dtype).removeprefix("torch.")
            entries.append({"kind": kind, "name": part.name, "shape": shape, "dtype": dtype, "piece": asdict(piece)})
        if sum(values.nbytes for values in waiting.values()) >= max_file_bytes:
            flush()
    flush()
    return {"writer": writer_name, "entries": entries, "files": files}


def writer_name(stage: int, tensor_rank: int) -> str:
    """The name that a tensor rank of a pipeline stage writes under."""
    return f"pp{stage:02d}-tp{tensor_rank:02d}"


def _file_name(writer_name: str, number: int) -> str:
    return f"{writer_name}-{number:03d}.safetensors"


def commit(
    directory: str | Path,
    manifests: Iterable[Mapping[str, Any]],
    state: dict[str, Any],
    hf_source: str | Path | Companions,
    hf_config: PretrainedConfig | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    kept: Mapping[str, Mapping[str, tuple[int, ...]]] | None = None,
) -> None:
    """Write checkpoint.json and ``huggingface/``, and give the directory its final name, in place of an older one.

    Args:
        manifests: what every writer's `write_shard_file` returned.
        state: JSON values: step, data position, scheduler, random state, …
        hf_source: config and tokenizer, kept in memory, or where they are: a Hugging Face directory or a checkpoint.
        hf_config: the model's config, where it is another than the one there (a reward model made of a language model);
            needed where `hf_source` is no directory.
        shapes: of what the checkpoint has, where that is not the model: adapters.
        kept: the same of kinds that it does not have of all of them.

    Raises:
        ValueError: the manifests together are not the model: a piece is missing, or there twice, or of another model.
        UserError: the disk is full or refuses.
    """
    directory, companions = Path(directory), companions_of(hf_source)
    passthrough = companions.passthrough
    if passthrough is not None:
        manifests = [*manifests, write_shard_file(directory, PASSTHROUGH, passthrough.items())]
        kept = {**(kept or {}), PASSTHROUGH: passthrough.shapes()}
    files: dict[str, Any] = {}
    tensors: dict[str, dict[str, dict[str, Any]]] = {}
    for manifest in manifests:
        files |= manifest["files"]
        for entry in manifest["entries"]:
            whole = tensors.setdefault(entry["kind"], {}).setdefault(
                entry["name"], {"shape": list(entry["shape"]), "dtype": entry["dtype"], "pieces": []}
            )
            piece = entry["piece"]
            end = piece["start"] + piece["length"]
            whole["shape"][piece["dim"]] = max(whole["shape"][piece["dim"]], end)
            whole["pieces"].append(piece)
    if hf_config is None:
        assert not isinstance(hf_source, Companions)
        hf_config = read_hf_config(hf_source)
    _check_complete(tensors, logical_shapes(shape_of(hf_config)) if shapes is None else shapes, kept or {})
    partial = staging(directory)
    with writing(partial / "huggingface"):
        (partial / "huggingface").mkdir()
    settings = companions.settings | head_settings(hf_config)
    settings |= tying_settings(settings, has_own_head=not hf_config.tie_word_embeddings)
    records = {"config.json": write_json(partial / CONFIG, settings)}
    records |= write_companions(companions, partial / "huggingface")
    files |= {f"huggingface/{name}": record.to_json() for name, record in records.items()}
    text = sealed({"format": FORMAT, "version": VERSION, "files": files, "state": state, "tensors": tensors})
    with writing(partial / INDEX):
        (partial / INDEX).write_bytes(text)
    publish(directory)


def _check_complete(
    tensors: Mapping[str, Mapping[str, Any]],
    of_all: Mapping[str, tuple[int, ...]],
    kept: Mapping[str, Mapping[str, tuple[int, ...]]],
) -> None:
    if missing := kept.keys() - tensors.keys():
        raise ValueError(f"the writers gave no {min(missing)}")
    for kind, stored in tensors.items():
        shapes = kept.get(kind, of_all)
        if surplus := sorted(stored.keys() - shapes.keys()):
            raise ValueError(f"the model's config knows no {surplus[0]}, of which the writers gave {kind}")
        for name, shape in shapes.items():
            entry = stored.get(name)
            if entry is None or tuple(entry["shape"]) != shape or not _covers(entry["pieces"], shape):
                raise ValueError(f"the writers' pieces do not make up {kind} of {name} {shape}")


def _covers(pieces: list[Any], shape: tuple[int, ...] | list[int]) -> bool:
    """Whether pieces along one dimension make a tensor up, each element once."""
    end, dims = 0, {piece["dim"] for piece in pieces}
    if len(dims) != 1:
        return False
    for piece in sorted(pieces, key=lambda piece: piece["start"]):
        if piece["start"] != end:
            return False
        end += piece["length"]
    return end == shape[dims.pop()]


class _ShardedSource:
    """The logical tensors of one kind, out of the pieces of a checkpoint."""

    def __init__(self, directory: Path, tensors: Mapping[str, Any]) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._pieces: dict[str, list[StoredPiece]] = {}
        self._files: dict[str, SafetensorsFile] = {}
        for name, entry in tensors.items():
            try:
                self._add(directory, name, entry)
            except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
                raise UserError(f"{directory / INDEX}: what it says of {name} makes no sense; it is damaged") from error

    def _add(self, directory: Path, name: str, entry: Any) -> None:
        shape, dtype = tuple(entry["shape"]), DTYPE_NAMES[entry["dtype"]]
        pieces = [StoredPiece(**piece) for piece in entry["pieces"]]
        numbers = [*shape, *(number for piece in pieces for number in (piece.dim, piece.start, piece.length))]
        if not all(type(number) is int and number >= 0 for number in numbers) or not _covers(entry["pieces"], shape):
            raise ValueError(name)
        for piece in pieces:
            if piece.file not in self._files:
                self._files[piece.file] = SafetensorsFile(file_inside(directory, piece.file, INDEX))
            file = self._files[piece.file]
            stored = (*shape[: piece.dim], piece.length, *shape[piece.dim + 1 :])
            if file.shape(piece.key) != stored or file.dtype(piece.key) is not dtype:
                raise UserError(f"{file.path}: tensor {piece.key} is not what {INDEX} says; the checkpoint is damaged")
        self._shapes[name], self._dtypes[name], self._pieces[name] = shape, dtype, pieces

    def names(self) -> Iterable[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        shape = list(self._shapes[name])
        assert start >= 0 and start + length <= shape[dim], (name, dim, start, length)
        shape[dim] = length
        out = torch.empty(shape, dtype=self._dtypes[name])
        for piece in self._pieces[name]:
            file = self._files[piece.file]
            if piece.dim != dim:
                out.narrow(piece.dim, piece.start, piece.length).copy_(file.read(piece.key, dim, start, length))
                continue
            low, high = max(start, piece.start), min(start + length, piece.start + piece.length)
            if low < high:
                part = file.read(piece.key, dim, low - piece.start, high - low)
                out.narrow(dim, low - start, high - low).copy_(part)
        return out

    def release(self) -> None:
        for file in self._files.values():
            file.release()


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        state: what `commit` was given.
        files: size and hash of every file but checkpoint.json; None in a checkpoint of older code.
    """

    directory: Path
    state: dict[str, Any]
    tensors: dict[str, Any]
    files: dict[str, FileRecord] | None = None

    @property
    def huggingface(self) -> Path:
        """The directory with config.json and the tokenizer."""
        return self.directory / "huggingface"

    def check_files(self, share: int = 0, num_shares: int = 1) -> None:
        """Read every file and compare its hash, where the checkpoint has hashes; sizes first.

        Args:
            share: of `num_shares` processes that divide the work among them, this one's number.

        Raises:
            UserError: naming a file that is missing or not what was written.
        """
        if self.files is not None:
            check_bytes(self.directory, self.files, share, num_shares)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is stored of each parameter."""
        return tuple(self.tensors)

    def source(self, kind: str) -> TensorSource:
        """The logical tensors of a kind.

        Raises:
            UserError: the checkpoint has none, its index makes no sense, or a file is missing, truncated or another.
        """
        if not isinstance(self.tensors.get(kind), dict):
            raise UserError(f"{self.directory} holds no {kind}; it has {', '.join(self.kinds) or 'nothing'}")
        return _ShardedSource(self.directory, self.tensors[kind])


def passthrough_tensors(path: str | Path) -> Passthrough | None:
    """What a Hugging Face directory or a checkpoint has beside the model's own tensors.

    Raises:
        UserError: it cannot be opened.
    """
    if not is_checkpoint(path):
        return passthrough_of(open_hf(path, keep_mapped=True), shape_of(read_hf_config(path)).num_layers)
    checkpoint = open_checkpoint(path, verify=False)
    if PASSTHROUGH not in checkpoint.kinds:
        return None
    source = checkpoint.source(PASSTHROUGH)
    return Passthrough(source, list(source.names()))


def companions_with_tensors(path: str | Path, chat_template: str | None = None) -> Companions:
    """All that stands beside the weights of a Hugging Face directory or a checkpoint: `companions_of`, and
    `passthrough_tensors`."""
    return replace(companions_of(path, chat_template), passthrough=passthrough_tensors(path))


def is_checkpoint(directory: str | Path) -> bool:
    """Whether `directory` is a checkpoint of ours (whole, since it is renamed only then)."""
    return (Path(directory) / INDEX).is_file()


def open_checkpoint(directory: str | Path, verify: bool = True) -> Checkpoint:
    """Open a checkpoint; tensors are read from disk by `TensorSource.read` only, and hashed by `check_files`.

    Args:
        verify: compare the hash of checkpoint.json with the one in it, and the sizes of the other files with theirs.

    Raises:
        UserError: no checkpoint, another version, or damaged.
    """
    directory = Path(directory)
    if not is_checkpoint(directory):
        raise UserError(f"{directory} is not a checkpoint: it has no {INDEX}")
    path = directory / INDEX
    text = read_bytes(path)
    if verify and SEAL in text[:1000] and not is_sealed(text):
        raise UserError(f"{path} is damaged: its bytes are not those that were written")
    index = parse_json(text, path)
    version = index.get("version")
    if index.get("format") != FORMAT or version not in (WITHOUT_HASHES, VERSION) or isinstance(version, bool):
        raise UserError(f"{path} is not a {FORMAT} of version {VERSION}; use the megadpo that wrote it")
    if verify and (version == VERSION) is not is_sealed(text):
        raise UserError(f"{path} is damaged: its own hash is missing")
    if not isinstance(index.get("state"), dict) or not isinstance(index.get("tensors"), dict):
        raise UserError(f"{path} has no state or no tensors; it is damaged")
    files = None
    if version == VERSION:
        try:
            files = records_in(index["files"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: what it says of files makes no sense; it is damaged") from error
        if verify:
            check_sizes(directory, files)
    return Checkpoint(directory, index["state"], index["tensors"], files)


def open_weights(path: str | Path, verify: bool = True, share: int = 0, num_shares: int = 1) -> TensorSource:
    """The weights of a Hugging Face directory or of one of our checkpoints, whichever `path` is.

    Args:
        verify, share, num_shares: every file of a checkpoint is hashed, as in `Checkpoint.check_files`.

    Raises:
        UserError: neither, or damaged.
    """
    if not is_checkpoint(path):
        return open_hf(path)
    checkpoint = open_checkpoint(path, verify)
    if verify:
        checkpoint.check_files(share, num_shares)
    return checkpoint.source("weights")


def step_directory(root: str | Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return Path(root) / f"step_{step:08d}"


def step_of(directory: Path) -> int | None:
    """The step that a directory's name says it is of; None where it says none."""
    number = directory.name.removeprefix("step_")
    return int(number) if number != directory.name and number.isascii() and number.isdecimal() else None


def step_directories(root: str | Path) -> list[Path]:
    """All directories under `root` with the name of a step's checkpoint, whole or not, oldest step first."""
    steps = {path: step for path in Path(root).glob("step_*") if (step := step_of(path)) is not None and path.is_dir()}
    return sorted(steps, key=lambda path: (steps[path], path.name))


def step_checkpoints(root: str | Path) -> list[Path]:
    """Those of them that are checkpoints, by their looks."""
    return [path for path in step_directories(root) if is_checkpoint(path)]
