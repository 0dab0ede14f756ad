"""A check: what was looked at, what was found, and how to put it right."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

STATUSES = ("failed", "warning", "ok")
"""The gravest first."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what it is about, for people and scripts: "python", "output_dir locks".
        status: "ok", "warning" (works, but slower or less safe) or "failed" (a run does not, or must not, go).
        found: what is there, in a few words.
        fix: what to do; "" where nothing is to be done.
    """

    name: str
    status: str
    found: str
    fix: str = ""

    def __post_init__(self) -> None:
        assert self.status in STATUSES and (self.status == "ok" or self.fix), self


def has_failed(checks: Iterable[Check]) -> bool:
    """Whether a run would not go."""
    return any(check.status == "failed" for check in checks)
