"""Rows of a source: files, directories and patterns of them, and Hugging Face datasets."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from megadpo.config.given import GivenRows, dataset_kind
from megadpo.config.sources import Source
from megadpo.data.rows.columns import COMPARED
from megadpo.data.rows.json_text import parse_json
from megadpo.data.rows.row_files import SUFFIXES, Fields, Skip, arrow_rows, file_rows
from megadpo.data.rows.scalars import SPELLINGS
from megadpo.data.rows.splits import choose_split
from megadpo.errors import UserError, reason
from megadpo.files import expanded

if TYPE_CHECKING:
    import datasets

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def source_files(source: Source) -> list[Path] | None:
    """The files of a source on disk, sorted; None where it is a Hugging Face dataset or rows from Python.

    Raises:
        UserError: for a missing file, an unknown suffix, a pattern that fits none, a directory without a usable file or
            without the split that is wanted.
    """
    try:
        chosen = _chosen_files(source)
    except OSError as error:
        raise UserError(f"data: {source.path} cannot be looked at: {error.strerror}") from error
    return None if chosen is None else chosen[0]


def split_taken(source: Source) -> str | None:
    """A line on which split of a source is read, where it has several; None where it has none.

    Raises:
        UserError: what `source_files` and `load_dataset` raise.
    """
    kind = dataset_kind(source.path)
    if kind is not None and kind.endswith("Dict"):
        return f"of {source.name} the {source.split or _split_name(list(source.path), source)} split"
    chosen = _chosen_files(source)
    if chosen is None or not chosen[1]:
        return None
    files, split, num_left = chosen
    more = f", {num_left} other file{'s' * (num_left > 1)} left out" if num_left else ""
    return f"of {source.name} the {split} split: {', '.join(file.name for file in files[:4])}{' …' * (len(files) > 4)}{more}"


def _chosen_files(source: Source) -> tuple[list[Path], str, int] | None:
    """The files of a source, which split they are, and how many more there are."""
    if not isinstance(source.path, str):
        return None
    path = expanded(source.path, "data")
    if path.is_dir() and _is_saved_dataset(path):
        return None
    if not path.exists():
        if glob.has_magic(str(path)):
            return _matching_files(source, path), "", 0
        # "data/pairs", where there is a folder data/, is a mistyped path: the Hub is not asked for it.
        meant_here = len(path.parts) > 1 and Path(path.parts[0]).is_dir()
        if _HUB_ID.fullmatch(source.path) and not source.path.endswith(SUFFIXES) and not meant_here:
            return None
        if source.path.startswith("<") and source.path.endswith(">"):
            kind = source.path[1:-1].partition(",")[0]
            raise UserError(f"data: this run was given a {kind} from Python; name a file or pass the {kind} again")
        raise UserError(f"data: {source.path} does not exist")
    if source.subset is not None or (source.split is not None and path.is_file()):
        raise UserError(f"data: {source.path} is not a Hugging Face dataset: remove its `split` and `subset`")
    if path.is_file():
        _check_suffix(path, source)
        return [path], "", 0
    hidden = (".", "_")
    files = [item for item in path.rglob("*") if item.is_file() and item.name.endswith(SUFFIXES)]
    names = sorted(item.relative_to(path) for item in files)
    names = [name for name in names if not any(part.startswith(hidden) for part in name.parts)]
    if not names:
        raise UserError(f"data: directory {source.path} has no usable file; understood suffixes: {', '.join(SUFFIXES)}")
    chosen, split = choose_split(names, source.split, source.held_out, source.path)
    return [path / name for name in chosen], split, len(names) - len(chosen)


def _matching_files(source: Source, pattern: Path) -> list[Path]:
    files = sorted(Path(name) for name in glob.glob(str(pattern), recursive=True) if Path(name).is_file())
    if not files:
        raise UserError(f"data: no file fits {source.path}")
    for file in files:
        _check_suffix(file, source)
    return files


def _check_suffix(file: Path, source: Source) -> None:
    if not file.name.endswith(SUFFIXES):
        raise UserError(f"data: {file} has an unknown suffix; understood: {', '.join(SUFFIXES)}; write it as one of these")


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def load_dataset(source: Source, streamed: bool = False) -> datasets.Dataset | datasets.IterableDataset:
    """The Hugging Face dataset of a source: handed over in memory, written by `save_to_disk`, or from the Hub.

    Args:
        streamed: whether one on the Hub is read as it is asked for, and one that can only be read so is taken.

    Raises:
        UserError: where it cannot be loaded or has no such split.
    """
    import datasets

    loaded: Any = source.path
    if isinstance(source.path, str):
        path = expanded(source.path, "data")
        try:
            if path.exists():
                loaded = datasets.load_from_disk(str(path))
            else:
                loaded = datasets.load_dataset(source.path, source.subset, split=_hub_split(source), streaming=streamed)
        except UserError:
            raise
        except Exception as error:
            where = "as a saved dataset" if path.exists() else "is no file here and could not be loaded from the Hub"
            raise UserError(f"data: {source.path} {where}: {reason(error)}") from error
    if isinstance(loaded, datasets.DatasetDict | datasets.IterableDatasetDict):
        split = source.split or _split_name(list(loaded), source)
        if split not in loaded:
            raise UserError(f"data: {source.name} has no split {split!r}; it has {', '.join(loaded)}")
        loaded = loaded[split]
    if not isinstance(loaded, datasets.Dataset) and not (streamed and isinstance(loaded, datasets.IterableDataset)):
        raise UserError(f"data: {type(loaded).__name__} is not supported; hand over a map-style datasets.Dataset")
    return loaded


def _hub_split(source: Source) -> str:
    if source.split is not None or not source.held_out:
        return source.split or "train"
    import datasets

    return _split_name(datasets.get_dataset_split_names(source.path, source.subset), source)


def _split_name(names: Sequence[str], source: Source) -> str:
    """Which of a data set's splits is read where none is named: `train`, or one that is held out."""
    if not source.held_out:
        return "train"
    (first, *_), _ = choose_split([PurePath(name) for name in names], None, True, source.name)
    return str(first)


def iter_rows(source: Source, skip: Skip | None = None, streamed: bool = False) -> Iterator[tuple[str, Fields]]:
    """The rows of a source in order, columns renamed, each with its location ("file.jsonl:17") for error messages.

    Args:
        skip: rows to be left out at its beginning.
        streamed: as of `load_dataset`.

    Raises:
        UserError: for a missing file, invalid JSON or UTF-8 (with file and line), or a row that is no object.
    """
    files, skip = source_files(source), skip or Skip()
    for file in [None] if files is None else files:
        is_csv = file is not None and file.name.removesuffix(".gz").endswith(".csv")
        for location, row in _rows_from_datasets(source, skip, streamed) if file is None else file_rows(file, skip):
            if not isinstance(row, dict):
                raise UserError(f"{location}: a row must be a JSON object, this one is {_json_type(row)}")
            renamed = _rename(row, source)
            yield location, _numbers_of(renamed) if is_csv else renamed


def _rename(row: Fields, source: Source) -> Fields:
    columns: Mapping[str, str] = source.columns
    if not columns and not source.ignored:
        return row
    # A column must not be mixed from two fields: where one spelling is named, the others are left out.
    meant = [spellings for spellings in SPELLINGS.values() if not columns.keys().isdisjoint(spellings)]
    left_out = {*columns.values(), *source.ignored}.union(*meant)
    renamed = {key: value for key, value in row.items() if key not in left_out}
    return renamed | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def _numbers_of(row: Fields) -> Fields:
    """A row of a table of text with numbers, labels and lists where they are meant; what is none stays text."""
    meant = {
        "label",
        *(names[-1] for names in COMPARED),
        *(spelling for spellings in SPELLINGS.values() for spelling in spellings),
    }
    return {key: _number_of(value) if key in meant and isinstance(value, str) else value for key, value in row.items()}


def _number_of(text: str) -> Any:
    try:
        return parse_json(text.strip().lower() if text.strip().lower() in ("true", "false") else text)
    except ValueError:
        return text


def _json_type(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _rows_from_datasets(source: Source, skip: Skip, streamed: bool) -> Iterator[tuple[str, Any]]:
    """Rows of `datasets`, or of a list or a table in memory."""
    if isinstance(source.path, GivenRows):
        first = min(skip.left, len(source.path))
        skip.left -= first
        rows: Iterator[tuple[int, Any]] = enumerate(source.path.plain_rows(first), first)
    else:
        rows = _numbered_rows(load_dataset(source, streamed), skip)
    number = -1
    try:
        for number, row in rows:
            yield f"{source.name}: row {number}", row
    except UserError:
        raise
    except Exception as error:  # a user's generator, or the network
        where = f"after row {number}" if number >= 0 else "from its beginning"
        raise UserError(f"data: {source.name} cannot be read {where}: {reason(error)}") from error


def _numbered_rows(dataset: Any, skip: Skip) -> Iterator[tuple[int, Fields]]:
    number = 0
    num_rows = getattr(dataset, "num_rows", None)  # of an IterableDataset it is not known
    if num_rows is not None and skip.left:
        number = min(skip.left, num_rows)
        skip.left -= number
        if number == num_rows:
            return
        dataset = dataset.select(range(number, num_rows))
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        num_skipped = min(skip.left, table.num_rows)
        number, skip.left = number + num_skipped, skip.left - num_skipped
        for row in arrow_rows(table.slice(num_skipped)):
            yield number, row
            number += 1
