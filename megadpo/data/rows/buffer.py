"""A shuffle in bounded memory: of the rows in a buffer one is drawn, and the next row takes its place.

Which rows are drawn is a pure function of (seed, pass, rows). So a buffer can be made again as it was: its places are
replayed with the rows' numbers alone, and only the rows that are in it are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import numpy as np

from megadpo.errors import UserError

T = TypeVar("T")

# The purpose of these random numbers, part of their seed: data/batches/sampler.py has 0 and 1.
_BUFFER = 2


@dataclass(frozen=True)
class Place:
    """How far a pass over rows has come.

    Attributes:
        num_drawn: rows drawn.
        num_read: rows read: those drawn and those in the buffer.
    """

    num_drawn: int = 0
    num_read: int = 0


class ShuffleBuffer(Generic[T]):
    """The rows of one pass in the order in which they are drawn: an iterator, which knows its place.

    Args:
        read: from a number to the rows from that one on, each with its number.
        size: rows in the buffer; 1 keeps their order.
        number: of the pass.
        place: where to go on, of a buffer of the same size, seed, pass and rows.

    Raises:
        UserError: there are fewer rows than were read before.
    """

    def __init__(
        self, read: Callable[[int], Iterator[tuple[int, T]]], size: int, seed: int, number: int, place: Place = Place()
    ) -> None:
        assert size >= 1
        words, numbers = random_words(seed, number), _numbers_in_buffer(size, seed, number, place)
        for _ in islice(words, place.num_drawn):
            pass
        self._words, self.place = words, place
        first = min(numbers, default=place.num_read)
        self._rows = read(first)
        wanted = set(numbers)
        held = dict(row for row in islice(self._rows, place.num_read - first) if row[0] in wanted)
        if len(held) < len(wanted):
            raise UserError(
                f"data.train has fewer rows than the {place.num_read:,} that this run has read of it; put them back"
            )
        self._buffer = [held[each] for each in numbers]
        self._size = size

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self.place.num_read < self._size and self.place.num_drawn == 0:
            self._fill()
        if not self._buffer:
            raise StopIteration
        slot = slot_of(next(self._words), len(self._buffer))
        row = self._buffer[slot]
        following = next(self._rows, None)
        if following is not None:
            self._buffer[slot] = following[1]
        else:
            self._buffer[slot] = self._buffer[-1]
            self._buffer.pop()
        self.place = Place(self.place.num_drawn + 1, self.place.num_read + (following is not None))
        return row

    def _fill(self) -> None:
        self._buffer += [row for _, row in islice(self._rows, self._size - len(self._buffer))]
        self.place = Place(0, len(self._buffer))


def random_words(seed: int, number: int) -> Iterator[int]:
    """Random whole numbers below 2**64 without end, those of a pass."""
    bits = np.random.Philox(np.random.SeedSequence([seed, _BUFFER, number]))
    while True:
        yield from bits.random_raw(1024).tolist()


def slot_of(word: int, size: int) -> int:
    """A random place among `size`, of a random number below 2**64."""
    return (word * size) >> 64


def _numbers_in_buffer(size: int, seed: int, number: int, place: Place) -> list[int]:
    """The numbers of the rows that are in the buffer, by their places in it."""
    following = min(size, place.num_read)
    numbers = list(range(following))
    if size == 1:  # the order is kept: no need to go through it
        return list(range(place.num_drawn, place.num_read))
    for word in islice(random_words(seed, number), place.num_drawn):
        slot = slot_of(word, len(numbers))
        if following < place.num_read:
            numbers[slot] = following
            following += 1
        else:
            numbers[slot] = numbers[-1]
            numbers.pop()
    return numbers
