"""How many rows sources have, where that is known without reading them row by row: what progress is told as a part of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from megadpo.config.sources import Source
from megadpo.data.rows.sources import source_files
from megadpo.errors import UserError

MOST_BYTES = 1 << 30
"""Of files whose lines are counted: of more, counting would itself take seconds."""


def cheap_count(sources: Sequence[Source]) -> int | None:
    """Rows of all sources: the lines of jsonl files, what a parquet file and a `datasets.Dataset` say of themselves; None
    where one of them has to be read for that. A blank line counts as a row."""
    counts = [_count_of(source) for source in sources]
    return None if None in counts else sum(count for count in counts if count is not None)


def _count_of(source: Source) -> int | None:
    if not isinstance(source.path, str):
        num_rows = getattr(source.path, "num_rows", None)
        return num_rows if isinstance(num_rows, int) else None
    try:
        files = source_files(source)
        if files is None or not all(file.name.endswith((".jsonl", ".parquet")) for file in files):
            return None
        if sum(file.stat().st_size for file in files if file.name.endswith(".jsonl")) > MOST_BYTES:
            return None
        return sum(map(_rows_of, files))
    except (OSError, ValueError, UserError):  # said where the rows are read
        return None


def _rows_of(file: Path) -> int:
    """Raises OSError or ValueError where the file cannot be read."""
    if file.name.endswith(".parquet"):
        import pyarrow.parquet

        return int(pyarrow.parquet.ParquetFile(file).metadata.num_rows)
    count, last = 0, b"\n"
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            count, last = count + block.count(b"\n"), block[-1:]
    return count + (last != b"\n") * (os.path.getsize(file) > 0)
