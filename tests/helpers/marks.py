"""Parameters of which the fast tests take one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def all_but_the_first_slow(values: Iterable[Any]) -> list[Any]:
    """For `pytest.mark.parametrize`: the values, of which `-m "not slow"` runs the first alone."""
    first, *others = values
    return [first, *(pytest.param(value, marks=pytest.mark.slow) for value in others)]
