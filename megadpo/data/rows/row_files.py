"""Rows of a file: json, jsonl, csv and parquet (each also .gz), as JSON would have them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megadpo.data.rows.json_text import parse_json
from megadpo.errors import UserError, reason

Fields = dict[str, Any]
SUFFIXES = (
    *(".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".parquet.gz"),
    *(".csv", ".csv.gz"),
)
MAX_ROW_BYTES = 64 << 20
MAX_LIST_BYTES = 8 << 30
"""Of a json file that is one list: it is read as a whole."""


@dataclass
class Skip:
    """How many rows are still to be left out before the first that is wanted; readers count it down."""

    left: int = 0

    def passes(self) -> bool:
        """Whether the row at hand is to be left out."""
        if self.left == 0:
            return False
        self.left -= 1
        return True


def file_rows(file: Path, skip: Skip | None = None) -> Iterator[tuple[str, Any]]:
    """The rows of a file in order, each with its location ("file.jsonl:17") for error messages.

    Args:
        skip: rows to be left out at the beginning, without parsing them where the format lets that be.

    Raises:
        UserError: it cannot be read, or is not what its suffix says, with the line where that is known.
    """
    name, skip = file.name.removesuffix(".gz"), skip or Skip()
    try:
        with _open(file) as stream:
            if name.endswith(".parquet"):
                yield from _parquet_rows(file, stream, skip)
            elif name.endswith(".csv"):
                yield from (row for row in _csv_rows(file, stream) if not skip.passes())
            elif name.endswith(".jsonl") or not _starts_with_list(stream):
                hint = "" if name.endswith(".jsonl") else "; a .json file is a list or a row a line"
                yield from _json_lines(file, stream, hint, skip)
            else:
                yield from (row for row in _json_list(file, stream) if not skip.passes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data: {file} cannot be read: {reason(error)}") from error


def is_list(file: Path) -> bool:
    """Whether a .json file is one list, which can only be read as a whole.

    Raises:
        UserError: it cannot be read.
    """
    if not file.name.removesuffix(".gz").endswith(".json"):
        return False
    try:
        with _open(file) as stream:
            return _starts_with_list(stream)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data: {file} cannot be read: {reason(error)}") from error


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


def _json_lines(file: Path, stream: BinaryIO, hint: str, skip: Skip) -> Iterator[tuple[str, Any]]:
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        location = f"{file}:{number}"
        if len(line) > MAX_ROW_BYTES:
            raise UserError(
                f"{location}: the line has more than {MAX_ROW_BYTES >> 20} MiB; a row is not that long; shorten it"
            )
        if skip.left and (number > 1 or not line.startswith(b"\xef\xbb\xbf")):
            skip.left -= not line.isspace()
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            row = parse_json(text) if text else None
        except UnicodeDecodeError as error:
            raise UserError(f"{location}: invalid UTF-8 ({error.reason} at byte {error.start} of the line)") from error
        except ValueError as error:
            raise UserError(f"{location}: invalid JSON: {error}{hint}") from error
        if text and not skip.passes():
            yield location, row


def _json_list(file: Path, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    content = stream.read(MAX_LIST_BYTES + 1)
    if len(content) > MAX_LIST_BYTES:
        raise UserError(f"{file}: the list has more than {MAX_LIST_BYTES >> 30} GiB; write a row a line (.jsonl)")
    try:
        rows = parse_json(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line}: invalid UTF-8 ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: invalid JSON: {error}") from error
    except ValueError as error:
        raise UserError(f"{file}: invalid JSON: {error}") from error
    for number, row in enumerate(rows):
        yield f"{file}: row {number}", row


def _csv_rows(file: Path, stream: BinaryIO) -> Iterator[tuple[str, Fields]]:
    """The rows of a table with a line of names first; all cells are text, and an empty one is null."""
    csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), strict=True)
    names: list[str] = []
    try:
        for cells in reader:
            location = f"{file}:{reader.line_num}"
            if not names:
                names = [cell.strip() for cell in cells]
                if cells and (len(set(names)) < len(names) or "" in names):
                    raise UserError(f"{location}: the first line must name every column, each once, it is {cells!r:.60}")
            elif cells:
                if len(cells) != len(names):
                    raise UserError(f"{location}: {len(cells)} cells for {len(names)} columns; correct or drop the row")
                yield location, {name: cell or None for name, cell in zip(names, cells, strict=True)}
    except UnicodeDecodeError as error:
        raise UserError(f"{file}:{reader.line_num + 1}: invalid UTF-8 ({error.reason}) in or after this line") from error
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num}: invalid csv: {error}") from error


def _parquet_rows(file: Path, stream: BinaryIO, skip: Skip) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number, first_group = 0, 0
    try:
        parquet = pyarrow.parquet.ParquetFile(stream)
        while first_group < parquet.num_row_groups:
            num_rows = parquet.metadata.row_group(first_group).num_rows
            if num_rows > skip.left:
                break
            first_group, number, skip.left = first_group + 1, number + num_rows, skip.left - num_rows
        row_groups = range(first_group, parquet.num_row_groups)
        for batch in parquet.iter_batches(batch_size=1024, row_groups=row_groups):
            num_skipped = min(skip.left, batch.num_rows)
            number, skip.left = number + num_skipped, skip.left - num_skipped
            for row in arrow_rows(batch.slice(num_skipped)):
                yield f"{file}: row {number}", row
                number += 1
    except (pyarrow.ArrowException, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"data: {file} is no readable parquet file: {reason(error)}") from error


def arrow_rows(batch: Any) -> Iterator[Fields]:
    """The rows of an Arrow table or record batch as they would be in JSON.

    Raises:
        ValueError: two columns have the same name.
    """
    names = batch.schema.names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"it has the column {twice!r} twice")
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
        return parse_json(value) if is_json else value
    if pyarrow.types.is_struct(kind):
        is_message = value.get("role") is not None
        kept = [field for field in kind if value[field.name] is not None or (is_message and field.name == "content")]
        return {field.name: _as_json(value[field.name], field.type) for field in kept}
    if pyarrow.types.is_map(kind):
        return {key: _as_json(item, kind.item_type) for key, item in value}
    return [_as_json(item, kind.value_type) for item in value] if hasattr(kind, "value_type") else value
