"""Strict reading of options: YAML text, plain dicts and ``key.sub=value`` into a tree of dataclasses.

Nothing is guessed and nothing is ignored: an unknown key, a key given twice or a value of the wrong type is a UserError
that names the full dotted path, the place it came from, and what was expected. This module knows no option by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from megadpo.config import yaml_core
from megadpo.errors import UserError

Tree = TypeVar("Tree")
Places = dict[str, str]
"""Where each dotted path was given ("run.yaml, line 7"), for the error messages."""

MISSPELT = object()
WORDS = {"yes": True, "on": True, "no": False, "off": False}
"""Booleans to YAML 1.1 and text to YAML 1.2: booleans where an option is one."""


class UnknownKey(UserError):
    """A key that the tree does not have.

    Attributes:
        dotted: its full path.
        leaves: the last parts of the paths that there are.
        place: where it was given, followed by a colon, or "".
    """

    def __init__(self, root: type, dotted: str, place: str | None) -> None:
        keys = all_keys(root)
        suggestion = closest(dotted, keys)
        self.dotted, self.place = dotted, f"{place}: " if place else ""
        self.leaves = {key.rpartition(".")[2] for key in keys}
        super().__init__(f"{self.place}unknown key {dotted}" + (f"; did you mean {suggestion}?" if suggestion else ""))


def read_yaml(path: Path) -> tuple[dict[str, Any], Places]:
    """The mapping in a YAML file and the place of each of its keys. Raises UserError where it is not one."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = "; KEY=VALUE come after the file" if "=" in str(path) else ""
        raise UserError(f"configuration file {str(path)!r} does not exist{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"configuration file {str(path)!r} cannot be read: {error}") from None
    try:
        root = yaml_core.compose(text)
        places: Places = {}
        _note_places(root, "", path, places)
        value = yaml_core.construct(root)
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_line_of(error)}: not valid YAML: {_problem_of(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a usable configuration: {error}") from None
    if value is None:
        return {}, places
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a mapping of sections (model:, data:, …), got {describe(value)}")
    return value, places


def _note_places(node: yaml.Node | None, prefix: str, path: Path, places: Places) -> None:
    """Records the line of every key under `node` and refuses a key given twice."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        dotted = f"{prefix}{key.value}"
        place = f"{path}, line {key.start_mark.line + 1}"
        if dotted in places:
            raise UserError(f"{place}: {dotted} is given twice (first in {places[dotted]}); remove one of them")
        places[dotted] = place
        _note_places(value, f"{dotted}.", path, places)


def yaml_text(value: Any) -> str:
    """A scalar as YAML writes it."""
    return yaml_core.dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def _line_of(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}" if mark is not None else ""


def _problem_of(error: yaml.YAMLError) -> str:
    return " ".join(str(getattr(error, "problem", None) or error).split())


def apply_overrides(tree: type, values: Mapping[str, Any], overrides: Sequence[str], places: Places) -> dict[str, Any]:
    """A copy of `values` with each ``key.sub=value`` set; values are YAML (1e-6, true, null, [a, b], {a: b})."""
    result = _copy_mappings(values)
    for override in overrides:
        dotted, separator, text = override.partition("=")
        dotted = dotted.strip()
        if not separator or not dotted:
            raise UserError(f"override {override!r} is not of the form key=value, for example train.learning_rate=1e-6")
        place = "command line"
        hint = _hint_at(tree, dotted, place)
        try:
            value = yaml_core.parse(text)
        except yaml.YAMLError:
            value = text
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: {dotted} is no usable value: {error}") from None
        if value is not None and not isinstance(value, (list, dict)) and _takes_text(hint):
            value = text.strip() if not isinstance(value, str) else value
        *sections, last = dotted.split(".")
        at = result
        for section in sections:
            if not isinstance(at.get(section), dict):
                at[section] = {}
            at = at[section]
        at[last] = value
        for stale in [path for path in places if path == dotted or path.startswith(f"{dotted}.")]:
            del places[stale]
        places[dotted] = place
    return result


def _copy_mappings(values: Mapping[str, Any]) -> dict[str, Any]:
    # Of a DatasetDict, which is a mapping too, the very same object stays.
    is_ours = {key: isinstance(value, Mapping) and not hasattr(value, "num_columns") for key, value in values.items()}
    return {key: _copy_mappings(value) if is_ours[key] else value for key, value in values.items()}


def _hint_at(tree: type, dotted: str, place: str) -> Any:
    """The type of the option at a dotted path."""
    hint: Any = tree
    for part in dotted.split("."):
        if typing.get_origin(hint) is dict:
            hint = typing.get_args(hint)[1]
        elif dataclasses.is_dataclass(hint) and part in (hints := typing.get_type_hints(hint)):
            hint = hints[part]
        else:
            raise UnknownKey(tree, dotted, place)
    return hint


def _takes_text(hint: Any) -> bool:
    return hint is Any or hint is str or str in typing.get_args(hint)


def build(tree: type[Tree], values: Mapping[Any, Any], places: Places, root: type | None = None, prefix: str = "") -> Tree:
    """An instance of the dataclass `tree` from nested mappings; every key known and every value of its field's type."""
    root = root or tree
    hints = typing.get_type_hints(tree)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if key not in hints:
            raise UnknownKey(root, dotted, places.get(dotted))
        hint = hints[key]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            if value is None:
                continue
            if not isinstance(value, Mapping):
                raise UserError(f"{_at(places, dotted)}{dotted} is a section of options, got {describe(value)}")
            arguments[key] = build(hint, value, places, root, f"{dotted}.")
        else:
            arguments[key] = convert(hint, value, dotted, places)
    return tree(**arguments)


def all_keys(tree: type, prefix: str = "") -> list[str]:
    """Every dotted path of the tree, sections included."""
    keys: list[str] = []
    for name, hint in typing.get_type_hints(tree).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            keys += all_keys(hint, f"{prefix}{name}.")
    return keys


def closest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` was probably meant to be: the right name in another section counts as close."""
    choices = list(choices)
    leaf = word.rsplit(".", 1)[-1]
    if namesakes := [choice for choice in choices if choice.rsplit(".", 1)[-1] == leaf]:
        return difflib.get_close_matches(word, namesakes, n=1, cutoff=0.0)[0]
    if matches := difflib.get_close_matches(word, choices, n=1, cutoff=0.6):
        return matches[0]
    leaves = {choice.rsplit(".", 1)[-1]: choice for choice in choices}
    matches = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)
    return leaves[matches[0]] if matches else None


def convert(hint: Any, value: Any, dotted: str, places: Places) -> Any:
    """`value` as the type `hint`, or a UserError that names path, value and expected type. A bool is not an int."""
    converted = _converted(hint, value)
    if converted is not MISSPELT:
        return converted
    raise UserError(f"{_at(places, dotted)}{dotted} must be {expected(hint)}, got {describe(value)}")


def _converted(hint: Any, value: Any) -> Any:
    """`value` as the type `hint`, or MISSPELT."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        for option in typing.get_args(hint):
            if (converted := _converted(option, value)) is not MISSPELT:
                return converted
        return MISSPELT
    if hint is type(None):
        return None if value is None else MISSPELT
    if origin is tuple:
        parts = typing.get_args(hint)
        if not isinstance(value, (list, tuple)) or len(value) != len(parts):
            return MISSPELT
        items = [_converted(part, item) for part, item in zip(parts, value, strict=True)]
        return MISSPELT if any(item is MISSPELT for item in items) else tuple(items)
    if origin is list:
        if not isinstance(value, (list, tuple)):
            return MISSPELT
        items = [_converted(typing.get_args(hint)[0], item) for item in value]
        return MISSPELT if any(item is MISSPELT for item in items) else items
    if origin is dict:
        if not isinstance(value, Mapping) or not all(type(key) is str for key in value):
            return MISSPELT
        entries = {key: _converted(typing.get_args(hint)[1], item) for key, item in value.items()}
        return MISSPELT if any(item is MISSPELT for item in entries.values()) else entries
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if hint is float:
        return _float(value)
    if hint is bool and isinstance(value, str):
        return WORDS.get(value.lower(), MISSPELT)
    return value if type(value) is hint else MISSPELT


def _float(value: Any) -> Any:
    """A number, or one in quotes."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number and not (isinstance(value, str) and yaml_core.NUMBER.fullmatch(value)):
        return MISSPELT
    try:
        return float(value)
    except (ValueError, OverflowError):
        return MISSPELT


def expected(hint: Any) -> str:
    """A type in words."""
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    if hint in names:
        return names[hint]
    if typing.get_origin(hint) is tuple:
        return f"a list of {len(typing.get_args(hint))} numbers"
    if typing.get_origin(hint) is dict:
        return f"a mapping from text to {expected(typing.get_args(hint)[1])}"
    if typing.get_origin(hint) is list:
        return f"a list, each item {expected(typing.get_args(hint)[0])}"
    return " or ".join(expected(option) for option in typing.get_args(hint))


def describe(value: Any) -> str:
    """A value in an error message: its text, and its type where the text does not tell."""
    if value is None:
        return "null (nothing)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, (int, float)):
        return f"the number {value!r}"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return f"the list {list(value)!r}"
    return f"{value!r} ({type(value).__name__}); put it in quotes if text is meant"


def _at(places: Places, dotted: str) -> str:
    return f"{places[dotted]}: " if dotted in places else ""
