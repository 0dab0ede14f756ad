"""JSON as rows may have it: a key once in an object, numbers and nesting of a size that anyone means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MOST_DIGITS = 4300
"""Of a whole number: where Python itself stops, so that a row cannot keep it busy."""
DEEPEST = 100
"""Levels of objects and lists in what a template is given."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none (json.JSONDecodeError, with its line), or has a key twice, a whole number of more than
            `MOST_DIGITS` digits, or is nested too deeply for Python.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise ValueError(f"a whole number has more than {MOST_DIGITS:,} digits") from None
        raise


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.60} is there twice in one object; remove one of them")
    return built


def is_too_deep(value: Any, levels: int = DEEPEST) -> bool:
    """Whether objects and lists lie more than `levels` deep."""
    layer = [value]
    for _ in range(levels + 1):
        layer = [item for parent in layer for item in _children(parent)]
        if not layer:
            return False
    return True


def _children(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [item for item in value.values() if isinstance(item, Mapping | list | tuple)]
    if isinstance(value, list | tuple):
        return [item for item in value if isinstance(item, Mapping | list | tuple)]
    return []
