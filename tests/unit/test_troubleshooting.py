"""docs/troubleshooting.md quotes what megadpo says, and nothing that it does not say."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r'^\| "([^"]+)" \|', PAGE, re.MULTILINE)
GAP = "\0"
"""Stands for what is put into a text."""


def texts_of(tree: ast.AST) -> list[str]:
    """Every text of a module; those joined of several parts whole."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else GAP for part in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


@pytest.fixture(scope="module")
def texts() -> list[str]:
    files = (ROOT / "megadpo").rglob("*.py")
    return [text for file in files for text in texts_of(ast.parse(file.read_text(encoding="utf-8")))]


@pytest.mark.parametrize("quoted", QUOTED)
def test_what_is_quoted_is_said(quoted: str, texts: list[str]) -> None:
    parts = [part.strip() for part in quoted.split("…") if part.strip()]
    pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    assert parts and any(pattern.search(text) for text in texts), quoted


def test_there_are_such_quotes_and_keys_that_are_named_exist() -> None:
    from megadpo.config.schema import Config
    from megadpo.config.strict import all_keys

    keys = set(all_keys(Config))
    sections = "|".join(sorted({key.partition(".")[0] for key in keys if "." in key}))
    named = re.findall(rf"`((?:{sections})\.[a-z_]\w*)", PAGE)
    assert len(QUOTED) > 15 and len(named) > 20
    assert {name for name in named if not name.endswith((".jinja", ".json"))} <= keys
