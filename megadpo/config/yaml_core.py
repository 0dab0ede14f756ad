"""YAML by the core schema of its version 1.2: numbers are those that people write, and only true and false are booleans.

PyYAML knows version 1.1, where 010 is 8, 1:30 is 90, 1e-6 is text, and no is false.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MOST_VALUES = 10_000
"""Of a document with its aliases written out: a configuration has some hundred."""
MOST_DIGITS = 400

_CORE = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+(_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
)
"""Tag, what is read so (core schema, and underscores between digits), and the characters it begins with."""

NUMBER = re.compile(_CORE[3][1])


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012, PyYAML's own attribute


class _Dumper(yaml.SafeDumper):
    """Puts in quotes whatever text version 1.1 or 1.2 would not read as text."""

    yaml_implicit_resolvers = {key: list(known) for key, known in yaml.SafeDumper.yaml_implicit_resolvers.items()}  # noqa: RUF012


for _tag, _pattern, _first in _CORE:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("$"), [""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("<<$"), ["<"])


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a whole number has {len(text):,} digits")
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def compose(text: str) -> yaml.Node | None:
    """The nodes of a document, with their places.

    Raises:
        yaml.YAMLError: it is no YAML.
        ValueError: it has more than `MOST_VALUES` values, or contains itself.
    """
    loader = _Loader(text)
    try:
        node: yaml.Node | None = loader.get_single_node()
        num_values = 0 if node is None else _num_values(node, {})
    except RecursionError:
        raise ValueError("lists and mappings are nested too deeply") from None
    finally:
        loader.dispose()
    if num_values > MOST_VALUES:
        raise ValueError(f"it has more than {MOST_VALUES:,} values, aliases written out")
    return node


def construct(node: yaml.Node | None) -> Any:
    """The value of a document's nodes.

    Raises:
        yaml.YAMLError, ValueError: a tag or scalar that has no value.
    """
    try:
        return None if node is None else _Loader("").construct_document(node)
    except (AttributeError, KeyError, TypeError) as error:  # PyYAML's own, of a tag on what is nothing of its kind
        raise ValueError("a value is not what its tag (!!…) says") from error


def parse(text: str) -> Any:
    """The value of a YAML text; raises what `compose` and `construct` raise."""
    return construct(compose(text))


def dump(value: Any, **options: Any) -> str:
    """The YAML text of plain values; either version of YAML reads them back."""
    return str(yaml.dump(value, Dumper=_Dumper, **options))


def _num_values(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Values under a node, those behind aliases counted wherever they stand."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise ValueError("a list or mapping contains itself")
        return found
    known[id(node)] = None
    parts = [part for item in node.value for part in (item if isinstance(node, yaml.MappingNode) else (item,))]
    known[id(node)] = total = 1 + sum(_num_values(part, known) for part in parts)
    return total
