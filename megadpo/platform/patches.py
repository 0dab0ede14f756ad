"""Attributes of other libraries' modules that are replaced for a while: every one in one scope, which puts them back.

docs/architecture.md lists them all, with the reason for each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

_scopes: list[contextlib.ExitStack] = []


@contextlib.contextmanager
def patches_undone() -> Iterator[None]:
    """At the end, what `patch` has replaced within is put back. Scopes may be nested."""
    with contextlib.ExitStack() as scope:
        _scopes.append(scope)
        try:
            yield
        finally:
            _scopes.remove(scope)


def patch(owner: Any, name: str, value: Any) -> None:
    """Replace an attribute until the end of the innermost scope; outside of any, until the end of the process."""
    original = getattr(owner, name)
    if original is value:
        return
    if _scopes:
        _scopes[-1].callback(setattr, owner, name, original)
    setattr(owner, name, value)


def when_undone(callback: Callable[[], Any]) -> None:
    """Call this at the end of the innermost scope; outside of any, never, nor where an error ends it: what is tidied up then
    may wait for a device or a rank that does not answer any more."""

    def call(kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            callback()

    if _scopes:
        _scopes[-1].push(call)
