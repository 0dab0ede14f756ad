"""Sources of rows as the configuration names them: `data.train` and `data.eval`, read strictly."""

from __future__ import annotations

import re
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
ROW_FIELDS = {"chosen", "rejected", "prompt", "messages", "completion", "text"}
"""Some that rows have."""


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


SET_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def check_eval_sets(value: Any, name: str) -> Any:
    """The value of `data.eval` as `check_sources` gives it, or, where it names several sets, a dict of such values by name.

    A mapping with a `path` is one source; any other is names with sources. So is a DatasetDict, but for one that has a train
    split: that is a data set, of which the held-out split is meant.

    Raises:
        UserError: as `check_sources`, or a name that is none.
    """
    if not isinstance(value, Mapping) or not _is_names(value):
        return check_sources(value, name)
    if not value:
        raise UserError(f"{name} is an empty mapping; give a source, or a name with a source for each set")
    sets = {}
    for key, sources in value.items():
        if not isinstance(key, str) or not SET_NAME.fullmatch(key):
            quotes = "" if isinstance(key, str) else "; what YAML reads as something else than text needs quotes"
            raise UserError(f"{name}: {str(key)[:40]!r} is no name for a set; use letters, digits, `_`, `-` and `.`{quotes}")
        checked = check_sources(sources, f"{name}.{key}")
        if checked is None:
            raise UserError(f"{name}.{key} has no source; give one or take the name out")
        sets[key] = checked
    return sets


def _is_names(value: Mapping[Any, Any]) -> bool:
    """Whether a mapping is meant as names of sets: no key is one of a source or of a row."""
    if is_given(value):
        return "train" not in value
    return {*_TYPES, *ROW_FIELDS}.isdisjoint(value)


def eval_sets(value: Any) -> dict[str, Any]:
    """The held-out sets that a checked `data.eval` has, by name: one without a name is "", null is none."""
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) and not is_given(value) else {"": value}


def eval_label(name: str) -> str:
    """How a held-out set is called beside "train"."""
    return f"eval {name}" if name else "eval"


def is_held_out(label: str) -> bool:
    """Whether a name is one that `eval_label` gives."""
    return label.partition(" ")[0] == "eval"


def eval_prefix(name: str) -> str:
    """What the names of a held-out set's metrics begin with."""
    return f"eval_{name}_" if name else "eval_"


def _check_source(value: Any, name: str) -> Any:
    value = taken(value, name)
    if is_given(value):
        return value
    if isinstance(value, Mapping):
        if "path" not in value:
            rows = "; rows are given as a list with a dict a row"
            is_row = not ROW_FIELDS.isdisjoint(value)
            names = "; several sets are {name: source, …}" if name == "data.eval" else ""
            said = rows if is_row else names
            raise UserError(f"{name} has no path; a source is a path or {{path, weight, split, subset, columns}}{said}")
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
