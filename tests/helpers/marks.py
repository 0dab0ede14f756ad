"""Parameters of which the fast tests take one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import pytest


def all_but_the_first_slow(values: Iterable[Any]) -> list[Any]:
    """For `pytest.mark.parametrize`: the values, of which `-m "not slow"` runs the first alone."""
    first, *others = values
    return [first, *(pytest.param(value, marks=pytest.mark.slow) for value in others)]


def all_but_a_few_exhaustive(values: Iterable[Any], slow: Iterable[int]) -> list[Any]:
    """The values, of which the first is fast, those with the numbers `slow` are slow, and all others `exhaustive`."""
    first, *others = values
    marks = [pytest.mark.slow if number in slow else pytest.mark.exhaustive for number in range(1, len(others) + 1)]
    return [first, *(pytest.param(value, marks=mark) for value, mark in zip(others, marks, strict=True))]


def skip_without(package: str) -> None:
    """Skip a module's tests where a package is missing, which is not imported for that: DeepSpeed takes three seconds."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is missing", allow_module_level=True)
