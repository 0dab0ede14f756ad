"""Sources of rows as the configuration names them: `data.train` and `data.eval`, read strictly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megadpo.config import strict
from megadpo.config.given import called, is_given, taken
from megadpo.errors import UserError


@dataclass(frozen=True)
class Source:
    """One entry of `data.train` or `data.eval`.

    Attributes:
        path: a file, a directory (of files, or written by `save_to_disk`), a Hub id, or rows from Python (config/given.py).
        weight: how many times an epoch sees each of its rows.
        split: of a Hugging Face dataset; None means "train".
        subset: the configuration name of a dataset on the Hub.
        columns: our field name -> the field's name in the file.
        ignored: fields of the file that are not looked at.
        held_out: whether rows are to be evaluated on, so that of a data set with splits the held-out one is meant.
    """

    path: Any
    weight: float = 1.0
    split: str | None = None
    subset: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    held_out: bool = False

    @property
    def name(self) -> str:
        """The path, or what rows from Python are."""
        return self.path if isinstance(self.path, str) else called(self.path)


_TYPES: dict[str, Any] = {
    "path": str,
    "weight": float,
    "split": str | None,
    "subset": str | None,
    "columns": dict[str, str],
}
"""The keys of a source that is written as a mapping, and their types there."""


def parse_sources(
    value: Any,
    columns: Mapping[str, str] | None = None,
    name: str = "data",
    ignored: Sequence[str] = (),
    held_out: bool = False,
) -> list[Source]:
    """The sources that the value of `data.train` or `data.eval` stands for.

    Args:
        value: a path, a Hub id, rows from Python, a {path, weight, split, subset, columns} mapping, or a list of those.
        columns: renames for every source; a source's own renames win.
        name: the option's name, for error messages.
        ignored, held_out: of every source.

    Raises:
        UserError: what `check_sources` raises, or no value at all.
    """
    checked = check_sources(value, name)
    if checked is None:
        raise UserError(_empty(name))
    entries = checked if isinstance(checked, list) else [checked]
    given = [entry if type(entry) is dict else {"path": entry} for entry in entries]
    common = {"ignored": tuple(ignored), "held_out": held_out}
    return [Source(**{**entry, "columns": {**(columns or {}), **entry.get("columns", {})}, **common}) for entry in given]


def check_sources(value: Any, name: str) -> Any:
    """The value of `data.train` or `data.eval` with its types checked, in the form in which config.yaml shows it.

    Returns:
        None, a text, rows from Python as `given.taken` gives them, or a list of these and of dicts.

    Raises:
        UserError: an empty list or path, an unknown key, or a value of the wrong type or out of range.
    """
    value = taken(value, name)
    if value is None or is_given(value):
        return value
    if isinstance(value, (list, tuple)):
        if not value:
            raise UserError(f"{name} is an empty list; name at least one source")
        return [_check_source(item, f"{name}[{index}]") for index, item in enumerate(value)]
    source = _check_source(value, name)
    return [source] if type(source) is dict else source


def _check_source(value: Any, name: str) -> Any:
    value = taken(value, name)
    if is_given(value):
        return value
    if isinstance(value, Mapping):
        if "path" not in value:
            rows = "; rows are given as a list with a dict a row"
            is_row = not {"chosen", "rejected", "prompt", "messages", "completion", "text"}.isdisjoint(value)
            raise UserError(
                f"{name} has no path; a source is a path or {{path, weight, split, subset, columns}}{rows if is_row else ''}"
            )
        for key in value:
            if key not in _TYPES:
                guess = strict.closest(str(key), _TYPES)
                raise UserError(f"unknown key {name}.{key}" + (f"; did you mean {name}.{guess}?" if guess else ""))
        source = {
            key: _path(item, f"{name}.path") if key == "path" else strict.convert(_TYPES[key], item, f"{name}.{key}", {})
            for key, item in value.items()
        }
        if isinstance(source["path"], str) and not source["path"].strip():
            raise UserError(_empty(f"{name}.path"))
        if not 0 < source.get("weight", 1.0) < float("inf"):
            raise UserError(f"{name}.weight must be greater than 0, got {source['weight']!r}")
        return source
    text = strict.convert(str | None, value, name, {})
    if text is None or not text.strip():
        raise UserError(_empty(name))
    return text


def _path(value: Any, name: str) -> Any:
    given = taken(value, name)
    return given if is_given(given) else strict.convert(str, given, name, {})


def _empty(name: str) -> str:
    return f"{name} is empty; give a file, a directory or a Hugging Face dataset id"
