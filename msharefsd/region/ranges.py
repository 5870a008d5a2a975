"""A set of byte ranges, which may be many.

Whoever shares a region decides how many there are: a page here and a page there is a
range each.  So whatever is asked costs the logarithm of their number, and beside that
only what the answer itself is long.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from sortedcontainers import SortedDict

_NONE: Final[SortedDict[int, int]] = SortedDict()
"""Of ranges that have never had one, as most have not: to make a new one costs a good part of
what it costs to attach."""


class Ranges:
    """Ranges [start, end) in order; they never overlap nor touch.

    The iterators look while they go: who changes the ranges meanwhile takes a list.
    """

    def __init__(self) -> None:
        self._ends: SortedDict[int, int] = _NONE
        """The end of each range by its start."""
        self.length = 0
        """Bytes in all of them."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._ends.items())

    def __bool__(self) -> bool:
        return bool(self._ends)

    def __len__(self) -> int:
        return len(self._ends)

    def __repr__(self) -> str:
        return f"Ranges({list(self)})"

    def find(self, at: int) -> tuple[int, int] | None:
        """The range that has the byte at `at`."""
        place = self._ends.bisect_right(at) - 1
        if place < 0:
            return None
        start, end = self._ends.peekitem(place)
        return (start, end) if at < end else None

    def contains(self, at: int) -> bool:
        """Whether a range has the byte at `at`."""
        return self.find(at) is not None

    def covers(self, start: int, end: int) -> bool:
        """Whether [start, end) lies in them as a whole."""
        found = self.find(start)
        return end <= start or (found is not None and end <= found[1])

    def touching(self, start: int, end: int) -> list[tuple[int, int]]:
        """The ranges, whole, that overlap [start, end) or are next to it."""
        before = self.find(start - 1)
        first = start if before is None else before[0]
        return [(low, self._ends[low]) for low in self._ends.irange(first, end)]

    def within(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of them that lie in [start, end), in order."""
        if start >= end:
            return
        before = self.find(start)
        first = start if before is None else before[0]
        for low in self._ends.irange(first, end, inclusive=(True, False)):
            yield max(low, start), min(self._ends[low], end)

    def gaps(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of [start, end) that lie in none of them, in order."""
        for low, high in self.within(start, end):
            if start < low:
                yield start, low
            start = high
        if start < end:
            yield start, end

    def add(self, start: int, end: int) -> None:
        """Add [start, end)."""
        if start >= end:
            return
        if self._ends is _NONE:
            self._ends = SortedDict()
        for low, high in self.touching(start, end):
            del self._ends[low]
            self.length -= high - low
            start, end = min(start, low), max(end, high)
        self._ends[start] = end
        self.length += end - start

    def remove(self, start: int, end: int) -> None:
        """Take [start, end) out."""
        for low, high in list(self.within(start, end)):
            whole = self.find(low)
            assert whole is not None
            del self._ends[whole[0]]
            if whole[0] < low:
                self._ends[whole[0]] = low
            if high < whole[1]:
                self._ends[high] = whole[1]
            self.length -= high - low

    def clear(self) -> None:
        """Take everything out."""
        self._ends.clear()
        self.length = 0
