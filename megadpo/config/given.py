"""What a user gives as data from Python: which objects are taken, what they are called, and their rows as JSON has them.

Neither pandas nor datasets is imported here: who gives such an object has imported it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megadpo.config import strict
from megadpo.errors import UserError

TAKEN = "a path, a Hub id, a list of dicts, a pandas.DataFrame, or a Dataset, DatasetDict or IterableDataset of datasets"
DATASETS = ("Dataset", "DatasetDict", "IterableDataset", "IterableDatasetDict")
SOURCE_KEYS = ("path", "weight", "split", "subset", "columns")


@dataclass(frozen=True, eq=False)
class GivenRows:
    """Rows in memory.

    Attributes:
        rows: dicts, or a pandas.DataFrame.
        name: what they are, for messages.
    """

    rows: Any
    name: str

    def __len__(self) -> int:
        return len(self.rows)

    def plain_rows(self, start: int = 0) -> Iterator[Any]:
        """The rows from number `start` on, in values of JSON; NaN of a DataFrame is null there."""
        if isinstance(self.rows, Sequence):
            yield from (plain(self.rows[number]) for number in range(start, len(self.rows)))
            return
        names = list(self.rows.columns)
        for values in self.rows.iloc[start:].itertuples(index=False, name=None):
            yield {name: _cell(value) for name, value in zip(names, values, strict=True)}


def is_given(value: Any) -> bool:
    """Whether `value` is rows from Python, as `taken` gives them."""
    return isinstance(value, GivenRows) or dataset_kind(value) is not None


def is_iterable_dataset(value: Any) -> bool:
    """Whether it can only be read from its beginning on."""
    return dataset_kind(value) in ("IterableDataset", "IterableDatasetDict")


def dataset_kind(value: Any) -> str | None:
    """Which class of `datasets` it is of; None: of none."""
    datasets = sys.modules.get("datasets")
    if datasets is None:
        return None
    return next((name for name in DATASETS if isinstance(value, getattr(datasets, name))), None)


def taken(value: Any, name: str) -> Any:
    """`value`, or the rows that it is, where it is rows from Python.

    Raises:
        UserError: it is something of Python's that rows cannot be read of; naming `name`.
    """
    if is_given(value):
        return value
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(value, pandas.DataFrame):
        if not all(isinstance(column, str) for column in value.columns) or not value.columns.is_unique:
            raise UserError(
                f"{name} is a pandas.DataFrame whose columns are not all named by a text of their own; rename them"
            )
        return _filled(GivenRows(value, "pandas.DataFrame"), name)
    if isinstance(value, (list, tuple)) and value and all(map(_is_row, value)):
        return GivenRows(value, "list of dicts")
    if isinstance(value, Mapping) and _is_table(value):
        raise UserError(f"{name} is a dict of columns; give datasets.Dataset.from_dict(…), or a list with a dict a row")
    is_text = value is None or isinstance(value, (str, bytes, bool, int, float, list, tuple, Mapping))
    if is_text or hasattr(value, "__fspath__"):
        return value
    if isinstance(value, Iterator):
        raise UserError(
            f"{name} is a {type(value).__name__}, which can be read only once; give a list of its rows, or "
            "datasets.IterableDataset.from_generator(function) with data.streaming"
        )
    raise UserError(f"{name} is a {type(value).__module__}.{type(value).__qualname__}; give {TAKEN}")


def described(value: Any) -> str:
    """Rows from Python as config.yaml shows them."""
    kind = dataset_kind(value)
    if kind == "Dataset":
        return f"<datasets.Dataset, {value.num_rows} rows, fingerprint {value._fingerprint}>"
    if kind is not None and kind.endswith("Dict"):
        return f"<datasets.{kind}, {', '.join(map(str, value))}>"
    return f"<{called(value)}, {len(value)} rows>" if kind is None else f"<datasets.{kind}>"


def called(value: Any) -> str:
    """What rows from Python are, for messages."""
    return value.name if isinstance(value, GivenRows) else f"datasets.{dataset_kind(value)}"


def plain(value: Any) -> Any:
    """A value as JSON would have it: numpy's numbers and arrays, and tuples, as Python's own."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist") and not isinstance(value, type):
        return plain(value.tolist())
    return value


def _cell(value: Any) -> Any:
    """A cell of a DataFrame, where what is missing is NaN, NA or NaT."""
    value = plain(value)
    is_missing = type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and math.isnan(value))
    return None if is_missing else value


def _filled(rows: GivenRows, name: str) -> GivenRows:
    if not len(rows):
        raise UserError(f"{name} is a {rows.name} without a row; give one with rows")
    return rows


def _is_row(value: Any) -> bool:
    """Whether a mapping is a row, not a source, whose `path` may be misspelt."""
    if not isinstance(value, Mapping) or is_given(value) or set(value) <= {*SOURCE_KEYS}:
        return False
    return all(strict.closest(str(key), ("path",)) is None for key in value)


def _is_table(value: Mapping[Any, Any]) -> bool:
    columns = list(value.values())
    return "path" not in value and len(columns) > 1 and all(isinstance(column, (list, tuple)) for column in columns)
