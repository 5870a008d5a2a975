"""Who waits for contents that are to be brought: see memory/awaited.py.

Nobody answers such a fault before they come.  Which pages it is about is kept in pieces, one
for each window, so that a sharer which faults again and again takes no memory of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from msharefsd.paging.window import Window

PIECE: Final = 8 << 20
"""Bytes: as large as the parts of an image."""


class Awaiting:
    """Of one region.  Offsets are bytes from its start."""

    def __init__(self) -> None:
        self._pieces: dict[Window, set[int]] = {}
        self._untold: dict[int, int] = {}
        """Of which it was not said yet that somebody waits, and where; the oldest first."""

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def add(self, window: Window, offset: int) -> None:
        """A thread waits for a page there."""
        piece = offset // PIECE
        waits = self._pieces.setdefault(window, set())
        if piece not in waits:
            waits.add(piece)
            self._untold.setdefault(piece, offset)

    def wanted(self) -> int | None:
        """Where somebody waits, of which this was not said yet; the oldest first."""
        for piece, offset in self._untold.items():
            del self._untold[piece]
            return offset
        return None

    def brought(self, start: int, end: int) -> Iterator[tuple[Window, int, int]]:
        """Who waits in the pieces of [start, end), and where; they are to look again."""
        first, last = start // PIECE, -(-end // PIECE)
        # What was not told yet, and has not come, is to be told still.
        left = set()
        for piece in range(first, last):
            offset = self._untold.get(piece, start)
            if start <= offset < end:
                self._untold.pop(piece, None)
            else:
                left.add(piece)
        for window, pieces in list(self._pieces.items()):
            for piece in pieces.intersection(range(first, last)):
                if piece not in left:
                    pieces.remove(piece)
                yield window, piece * PIECE, min((piece + 1) * PIECE, window.size)
            if not pieces:
                del self._pieces[window]

    def forget(self, window: Window) -> None:
        """It is gone."""
        self._pieces.pop(window, None)
