"""Attacks that only run with --exhaustive wait for a function by its name: a name that has moved must fail sooner."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
NAME = re.compile(r'"(megadpo(?:\.\w+)+):(\w+)"')


def test_every_function_that_an_attack_waits_for_is_where_it_looks_for_it() -> None:
    named = {found for path in sorted((TESTS / "faults").glob("*.py")) for found in NAME.findall(path.read_text())}
    assert len(named) > 5
    missing = [f"{module}:{name}" for module, name in sorted(named) if not hasattr(importlib.import_module(module), name)]
    assert not missing
