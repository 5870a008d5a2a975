"""A set of byte ranges."""

from __future__ import annotations

from collections.abc import Iterator


class Ranges:
    """Ranges in order, merged where they touch.  Few of them, so a list does."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._ranges)

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def add(self, start: int, end: int) -> None:
        """Add [start, end)."""
        kept = []
        for low, high in self._ranges:
            if high < start or low > end:
                kept.append((low, high))
            else:
                start, end = min(start, low), max(end, high)
        self._ranges = sorted([*kept, (start, end)])

    def within(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts that lie in [start, end)."""
        for low, high in self._ranges:
            if low < end and start < high:
                yield max(low, start), min(high, end)

    def contains(self, at: int) -> bool:
        """Whether a range has the byte at `at`."""
        return any(low <= at < high for low, high in self._ranges)
