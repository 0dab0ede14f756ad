"""Amounts by name (seconds, bytes) that are added up."""

from __future__ import annotations

from collections.abc import Mapping


class Sums(dict[str, float]):
    """A name that is not there has 0."""

    def __missing__(self, name: str) -> float:
        return 0.0

    def add(self, other: Mapping[str, float]) -> None:
        """Add `other`, name by name."""
        for name, amount in other.items():
            self[name] += amount

    def plus(self, other: Mapping[str, float]) -> Sums:
        """The sum of both, name by name."""
        both = Sums(self)
        both.add(other)
        return both

    def times(self, factor: float) -> Sums:
        """Each amount times `factor`."""
        return Sums({name: factor * amount for name, amount in self.items()})

    def total(self) -> float:
        """All of them together."""
        return sum(self.values())
