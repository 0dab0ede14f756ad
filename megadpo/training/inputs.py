"""What a run is made from, besides its options: digests that go into its checkpoints, and are compared when it goes on.

Of model files not every byte is read, see checkpoint/digest.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from megadpo.checkpoint.digest import ends_digest, file_digest, joined, named_digest
from megadpo.checkpoint.peft import adapter_files
from megadpo.config.given import GivenRows
from megadpo.config.schema import Config, ModelConfig
from megadpo.data.rows.cache_key import given_digest, tokenizer_files
from megadpo.data.rows.sources import source_files
from megadpo.data.rows.stream import StreamOptions
from megadpo.data.rows.templates import read_template
from megadpo.errors import UserError

if TYPE_CHECKING:
    from megadpo.training.models import ModelFiles

NAMES = {
    "model": "the files of model.path",
    "reference": "the files of reference.path",
    "adapter": "the files of adapter.path",
    "reference_adapter": "the files of reference.adapter",
    "tokenizer": "the tokenizer",
    "template": "data.chat_template",
    "data": "the training pairs that data.train gives",
    "stream": "data.shuffle, data.streaming_buffer or train.seed, by which data.train is streamed",
    "quantization": "model.quantization",
}
"""What each digest is of, in the words of a sentence."""


def digests(config: Config, policy: ModelFiles, reference: ModelFiles, data: str | StreamOptions) -> dict[str, str]:
    """A digest of each of NAMES, in hexadecimal; of the reference where there is one; of quantisation, how it is done.

    Args:
        data: the digest of the training groups, or the stream that they come from.

    Raises:
        UserError: a file cannot be read.
    """
    found = {
        "model": model_digest(policy),
        "tokenizer": joined(file_digest(file) for file in tokenizer_files(policy.huggingface)),
        "template": xxhash.xxh3_128_hexdigest((read_template(config.data.chat_template) or "").encode()),
        "data": data if isinstance(data, str) else stream_digest(data),
        "quantization": quantization_text(config.model),
    }
    if config.reference.mode != "none":
        found["reference"] = found["model"] if reference is policy else model_digest(reference)
    if isinstance(data, StreamOptions):
        found["stream"] = f"{data.buffer_size} {data.seed if data.buffer_size > 1 else ''}"
    for name, path in (("adapter", config.adapter.path), ("reference_adapter", config.reference.adapter)):
        if path is not None:
            found[name] = named_digest(adapter_files(path))
    return found


def stream_digest(stream: StreamOptions) -> str:
    """Of what a stream's groups are made from, without a pass over it: sizes, heads and ends of files, and options.

    Raises:
        UserError: a file cannot be read.
    """
    job = stream.job
    parts = [f"stream {job.max_length} {job.truncation} {job.reading.kind} {sorted(job.reading.row_values)}"]
    for source in stream.sources:
        parts.append(f"{source.weight:g} {source.split} {sorted(source.columns.items())} {sorted(source.ignored)}")
        if isinstance(source.path, GivenRows):
            parts.append(given_digest(source.path))
        elif (files := source_files(source)) is not None:
            parts += [f"{file.name} {ends_digest(file)}" for file in files]
        else:
            parts.append(f"{source.name} {source.subset}")
    return joined(parts)


def quantization_text(options: ModelConfig) -> str:
    """How frozen weights are held, for what is made with them."""
    if options.quantization == "none":
        return "none"
    return f"{options.quantization} by {options.quantization_block_size}{', double' * options.double_quantization}"


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
    return named_digest(model.files)
