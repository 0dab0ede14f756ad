"""Bytes or seconds by what they are for."""

from __future__ import annotations

from collections.abc import Mapping


class Amounts(dict[str, float]):
    """A number a name; a name that is not there has 0."""

    def __missing__(self, name: str) -> float:
        return 0.0

    def __add__(self, other: Mapping[str, float]) -> Amounts:
        """Name by name."""
        both = Amounts(self)
        both.add(other)
        return both

    def add(self, other: Mapping[str, float]) -> None:
        """Name by name, in place."""
        for name, amount in other.items():
            self[name] += amount

    def total(self) -> float:
        """Of all names."""
        return sum(self.values())

    def largest_first(self) -> list[tuple[str, float]]:
        """The names with their amounts."""
        return sorted(self.items(), key=lambda item: -item[1])
