"""The key of a token cache: a digest of all that the groups depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadpo.config.given import GivenRows
from megadpo.config.sources import Source
from megadpo.data.rows.sources import load_dataset, source_files
from megadpo.data.store import FORMAT_VERSION
from megadpo.errors import UserError

if TYPE_CHECKING:
    from megadpo.data.rows.dataset import TokeniseJob

# Increase it when the same rows, tokenizer and options give other groups than before.
CODE_VERSION = 4

_TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "config.json")
_TOKENIZER_SUFFIXES = (".model", ".tiktoken", ".jinja")


def cache_key(sources: Sequence[Source], job: TokeniseJob) -> str:
    """A hexadecimal key of everything that the groups depend on: contents of files, never their times; not weights."""
    import tokenizers
    import transformers

    options = {
        "code": [CODE_VERSION, FORMAT_VERSION],
        "libraries": [transformers.__version__, tokenizers.__version__],
        "chat_template": job.chat_template,
        "max_length": job.max_length,
        "truncation": job.truncation,
        "reading": [job.reading.kind, sorted(job.reading.row_values)],
        "columns": [[sorted(source.columns.items()), sorted(source.ignored)] for source in sources],
        "allow_no_prompt": job.allow_no_prompt,
        "tokenizer": [
            [str(file.relative_to(job.tokenizer_path)), _file_digest(file)]
            for file in tokenizer_files(Path(job.tokenizer_path))
        ],
        "sources": [_source_digest(source) for source in sources],
    }
    return hashlib.blake2b(json.dumps(options, sort_keys=True).encode(), digest_size=20).hexdigest()


def tokenizer_files(path: Path) -> list[Path]:
    """The files of a model directory that decide how its tokenizer works."""
    return [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and (file.name.startswith(_TOKENIZER_FILES) or file.name.endswith(_TOKENIZER_SUFFIXES))
    ]


def _source_digest(source: Source) -> list[Any]:
    files = source_files(source)
    if files is not None:
        return [[file.name, _file_digest(file)] for file in files]
    if isinstance(source.path, GivenRows):
        return [["rows", given_digest(source.path)]]
    import pyarrow

    sink = _HashSink()
    table = load_dataset(source).with_format("arrow")
    for batch in table.iter(batch_size=1000):
        with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_table(batch)
    return [["dataset", sink.hasher.hexdigest()]]


def given_digest(rows: GivenRows) -> str:
    """blake2b over rows in memory, in hexadecimal."""
    hasher = hashlib.blake2b(digest_size=20)
    for row in rows.plain_rows():
        hasher.update(json.dumps(row, default=str).encode())
    return hasher.hexdigest()


class _HashSink:
    """A file object that hashes what is written to it."""

    def __init__(self) -> None:
        self.hasher = hashlib.blake2b(digest_size=20)
        self.closed = False

    def write(self, content: Any) -> int:
        self.hasher.update(content)
        return len(content)

    def flush(self) -> None:
        """Does nothing: there is no buffer."""


def _file_digest(file: Path) -> str:
    hasher = hashlib.blake2b(digest_size=20)
    try:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                hasher.update(block)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    return hasher.hexdigest()
