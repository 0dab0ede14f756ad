"""What a run is made from, besides its options: digests that go into its checkpoints, and are compared when it goes on.

Of model files not every byte is read: small files whole, of large ones the head (which has names, shapes and places of all
tensors) and blocks spread over the rest. Training, merging or converting a model changes every tensor and is seen; a single
number that somebody changed by hand may not be.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from megadpo.checkpoint.peft import is_peft_directory
from megadpo.config.schema import Config
from megadpo.data.rows.dataset import tokenizer_files
from megadpo.data.rows.templates import read_template
from megadpo.errors import UserError

if TYPE_CHECKING:
    from megadpo.data.store import GroupStore
    from megadpo.training.setup import ModelFiles

WHOLE_BYTES = 16 << 20
"""Files up to this size are read whole, so many bytes at least of larger ones."""

BLOCK_BYTES = 64 << 10
HEAD_BYTES = 8 << 20

NAMES = {
    "model": "the files of model.path",
    "reference": "the files of reference.path",
    "adapter": "the files of adapter.path",
    "reference_adapter": "the files of reference.adapter",
    "tokenizer": "the tokenizer",
    "template": "data.chat_template",
    "data": "the training pairs that data.train gives",
}
"""What each digest is of, in the words of a sentence."""


def digests(config: Config, policy: ModelFiles, reference: ModelFiles, groups: GroupStore) -> dict[str, str]:
    """A digest of each of NAMES, in hexadecimal; of the reference where there is one.

    Raises:
        UserError: a file cannot be read.
    """
    found = {
        "model": model_digest(policy),
        "tokenizer": _joined(_file_digest(file) for file in tokenizer_files(policy.huggingface)),
        "template": xxhash.xxh3_128_hexdigest((read_template(config.data.chat_template) or "").encode()),
        "data": groups.digest,
    }
    if config.reference.mode != "none":
        found["reference"] = found["model"] if reference is policy else model_digest(reference)
    for name, path in (("adapter", config.adapter.path), ("reference_adapter", config.reference.adapter)):
        if path is not None:
            found[name] = _joined(f"{file.name} {_file_digest(file)}" for file in _adapter_files(Path(path)))
    return found


def changed_inputs(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Which of NAMES are not what a checkpoint was made from, in words; only those are compared that both have.

    Args:
        before: of the checkpoint.
        now: what `digests` gives.
    """
    return [words for name, words in NAMES.items() if name in before and name in now and before[name] != now[name]]


def refuse_changed(checkpoint: Path, changed: list[str]) -> None:
    """Raises UserError where anything has changed since the checkpoint was made: what."""
    if changed:
        raise UserError(
            f"changed since {checkpoint} was made: {' and '.join(changed)}; put back what was there, begin anew in another "
            "output_dir, or set checkpoint.changed_inputs to accept"
        )


def model_digest(model: ModelFiles) -> str:
    """The digest of a model's files, in hexadecimal.

    Raises:
        UserError: a file cannot be read.
    """
    return files_digest(model.huggingface, *(Path(path) for path in (model.path, model.merged) if path))


def files_digest(huggingface: Path, *directories: Path) -> str:
    """The same of the directory with config.json and of those with the tensors."""
    files = [file for directory in directories for file in sorted(directory.glob("*.safetensors"))]
    return _joined(f"{file.name} {_file_digest(file)}" for file in (huggingface / "config.json", *files))


def _adapter_files(directory: Path) -> list[Path]:
    """Of a PEFT directory or one of our checkpoints."""
    return [directory / "adapter_config.json"] * is_peft_directory(directory) + sorted(directory.glob("*.safetensors"))


def _joined(parts: Any) -> str:
    return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())


def _file_digest(file: Path) -> str:
    hasher = xxhash.xxh3_128()
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            hasher.update(str(size).encode())
            if size <= WHOLE_BYTES:
                hasher.update(stream.read())
            else:
                hasher.update(stream.read(HEAD_BYTES))
                num_blocks = (WHOLE_BYTES - HEAD_BYTES) // BLOCK_BYTES
                for number in range(1, num_blocks + 1):
                    stream.seek(HEAD_BYTES + (size - BLOCK_BYTES - HEAD_BYTES) * number // num_blocks)
                    hasher.update(stream.read(BLOCK_BYTES))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    return hasher.hexdigest()
