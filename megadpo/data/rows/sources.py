"""Rows of a source: json, jsonl and parquet files (also .gz), directories of them, and Hugging Face datasets."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from megadpo.config.sources import Source
from megadpo.data.rows.scalars import SPELLINGS
from megadpo.errors import UserError, reason

if TYPE_CHECKING:
    import datasets

Fields = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".parquet.gz")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def source_files(source: Source) -> list[Path] | None:
    """The files of a source on disk, sorted; None where it is a Hugging Face dataset.

    Raises:
        UserError: for a missing file, an unknown suffix, or a directory without a usable file.
    """
    if not isinstance(source.path, str):
        return None
    path = Path(source.path).expanduser()
    if path.is_dir() and _is_saved_dataset(path):
        return None
    if not path.exists():
        # "data/pairs", where there is a folder data/, is a mistyped path: the Hub is not asked for it.
        meant_here = len(path.parts) > 1 and Path(path.parts[0]).is_dir()
        if _HUB_ID.fullmatch(source.path) and not source.path.endswith(SUFFIXES) and not meant_here:
            return None
        if source.path.startswith("<datasets.Dataset"):
            raise UserError("data: this run was given a datasets.Dataset from Python; name a file or pass the Dataset again")
        raise UserError(f"data: {source.path} does not exist")
    if source.split is not None or source.subset is not None:
        raise UserError(f"data: {source.path} is not a Hugging Face dataset: remove its `split` and `subset`")
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"data: {source.path} has an unknown suffix; understood: {', '.join(SUFFIXES)}")
        return [path]
    hidden = (".", "_")
    files = [item for item in path.rglob("*") if item.is_file() and item.name.endswith(SUFFIXES)]
    files = [item for item in files if not any(part.startswith(hidden) for part in item.relative_to(path).parts)]
    if not files:
        raise UserError(f"data: directory {source.path} has no usable file; understood suffixes: {', '.join(SUFFIXES)}")
    return sorted(files)


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def load_dataset(source: Source) -> datasets.Dataset:
    """The Hugging Face dataset of a source: handed over in memory, written by `save_to_disk`, or from the Hub.

    Raises:
        UserError: where it cannot be loaded or has no such split.
    """
    import datasets

    loaded: Any = source.path
    if isinstance(source.path, str):
        path = Path(source.path).expanduser()
        try:
            if path.exists():
                loaded = datasets.load_from_disk(str(path))
            else:
                loaded = datasets.load_dataset(source.path, source.subset, split=source.split or "train")
        except Exception as error:
            where = "as a saved dataset" if path.exists() else "is no file here and could not be loaded from the Hub"
            raise UserError(f"data: {source.path} {where}: {reason(error)}") from error
    if isinstance(loaded, datasets.DatasetDict):
        split = source.split or "train"
        if split not in loaded:
            raise UserError(f"data: {source.name} has no split {split!r}; it has {', '.join(loaded)}")
        loaded = loaded[split]
    if not isinstance(loaded, datasets.Dataset):
        raise UserError(f"data: {type(loaded).__name__} is not supported; hand over a map-style datasets.Dataset")
    return loaded


def iter_rows(source: Source) -> Iterator[tuple[str, Fields]]:
    """The rows of a source in order, columns renamed, each with its location ("file.jsonl:17") for error messages.

    Raises:
        UserError: for a missing file, invalid JSON or UTF-8 (with file and line), or a row that is no object.
    """
    files = source_files(source)
    located = _dataset_rows(source) if files is None else (item for file in files for item in _file_rows(file))
    for location, row in located:
        if not isinstance(row, dict):
            raise UserError(f"{location}: a row must be a JSON object, this one is {_json_type(row)}")
        yield location, _rename(row, source.columns)


def _rename(row: Fields, columns: Mapping[str, str]) -> Fields:
    if not columns:
        return row
    # A column must not be mixed from two fields: where one spelling is named, the others are left out.
    meant = [spellings for spellings in SPELLINGS.values() if not columns.keys().isdisjoint(spellings)]
    left_out = {*columns.values()}.union(*meant)
    renamed = {key: value for key, value in row.items() if key not in left_out}
    return renamed | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def _json_type(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _dataset_rows(source: Source) -> Iterator[tuple[str, Fields]]:
    number = 0
    for table in load_dataset(source).with_format("arrow").iter(batch_size=1000):
        for row in _arrow_rows(table):
            yield f"{source.name}: row {number}", row
            number += 1


def _file_rows(file: Path) -> Iterator[tuple[str, Any]]:
    name = file.name.removesuffix(".gz")
    try:
        with _open(file) as stream:
            if name.endswith(".parquet"):
                yield from _parquet_rows(file, stream)
            elif name.endswith(".jsonl") or not _starts_with_list(stream):
                yield from _json_lines(file, stream)
            else:
                yield from _json_list(file, stream)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data: {file} cannot be read: {error}") from error


def _open(file: Path) -> BinaryIO:
    return gzip.open(file, "rb") if file.name.endswith(".gz") else file.open("rb")  # type: ignore[return-value]


def _starts_with_list(stream: BinaryIO) -> bool:
    """True where the first character that is no white space (or byte order mark) is a bracket; rewinds the stream."""
    first = b""
    while block := stream.read(4096):
        first = block.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        if first:
            break
    stream.seek(0)
    return first == b"["


def _json_lines(file: Path, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(stream, start=1):
        location = f"{file}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                yield location, json.loads(text)
        except UnicodeDecodeError as error:
            raise UserError(f"{location}: invalid UTF-8 ({error.reason} at byte {error.start} of the line)") from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{location}: invalid JSON: {error}") from error


def _json_list(file: Path, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    content = stream.read()
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line}: invalid UTF-8 ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: invalid JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"{file}: invalid JSON: nested too deeply") from error
    for number, row in enumerate(rows):
        yield f"{file}: row {number}", row


def _parquet_rows(file: Path, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=1024):
            for row in _arrow_rows(batch):
                yield f"{file}: row {number}", row
                number += 1
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"data: {file} is no readable parquet file: {reason(error)}") from error


def _arrow_rows(batch: Any) -> Iterator[Fields]:
    """The rows of an Arrow table or record batch as they would be in JSON."""
    kinds = {column.name: column.type for column in batch.schema}
    for row in batch.to_pylist():
        yield {name: _as_json(value, kinds[name]) for name, value in row.items()}


def _as_json(value: Any, kind: Any) -> Any:
    """An Arrow value without the nulls that Arrow fills in for keys which only other rows have, JSON columns decoded.

    Arrow cannot tell a key that is null from one that is missing. Only a message's content is kept as null, which is how
    messages with tool calls are written.
    """
    import pyarrow

    if value is None or not pyarrow.types.is_nested(kind):
        is_json = value is not None and getattr(kind, "extension_name", "") == "arrow.json"
        return json.loads(value) if is_json else value
    if pyarrow.types.is_struct(kind):
        is_message = value.get("role") is not None
        kept = [field for field in kind if value[field.name] is not None or (is_message and field.name == "content")]
        return {field.name: _as_json(value[field.name], field.type) for field in kept}
    if pyarrow.types.is_map(kind):
        return {key: _as_json(item, kind.item_type) for key, item in value}
    return [_as_json(item, kind.value_type) for item in value] if hasattr(kind, "value_type") else value
