"""Who waits for contents that are to be brought: see memory/awaited.py.

Nobody answers such a fault before they come, or before it is known that nobody brings them
(bringers.py).  Which pages it is about is kept in pieces, one for each window, so that a sharer
which faults again and again takes no memory of ours.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

from msharefsd.paging.window import Window

PIECE: Final = 8 << 20
"""Bytes: as large as the parts of an image."""


class Awaiting:
    """Of one region.  Offsets are bytes from its start, times those of time.monotonic()."""

    def __init__(self) -> None:
        self._pieces: dict[Window, dict[int, tuple[float, int]]] = {}
        """Since when somebody waits there, and where."""
        self._refused: dict[Window, set[int]] = {}
        """Who touches something there does not wait."""
        self._untold: dict[int, int] = {}
        """Of which it was not said yet that somebody waits, and where; the oldest first."""
        self.heard = time.monotonic()
        """When somebody who brings was heard of last; or when we began."""
        self._begun = self.heard

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def is_younger(self, seconds: float) -> bool:
        """Whether we began less than so long ago."""
        return time.monotonic() - self._begun < seconds

    def add(self, window: Window, offset: int) -> bool:
        """A thread waits for a page there; False if nobody is to wait there any more."""
        piece = offset // PIECE
        if piece in self._refused.get(window, ()):
            return False
        waits = self._pieces.setdefault(window, {})
        if piece not in waits:
            waits[piece] = time.monotonic(), offset
            self._untold.setdefault(piece, offset)
        return True

    def wanted(self) -> int | None:
        """Where somebody waits, of which this was not said yet; the oldest first."""
        for piece, offset in self._untold.items():
            del self._untold[piece]
            return offset
        return None

    def brings(self, *, anew: bool) -> None:
        """Somebody who brings was heard of: whoever comes now waits again.

        `anew`: it has not been told of those who wait, because there was another one.
        """
        self.heard = time.monotonic()
        self._refused.clear()
        if anew:
            places = (where for pieces in self._pieces.values() for where in pieces.values())
            self._untold = {offset // PIECE: offset for _, offset in sorted(places)}

    def refuse(self, before: float) -> Iterator[tuple[Window, int, int]]:
        """Nobody who has waited since before that time waits any more: who, and where.

        They are to look again.
        """
        for window, pieces in list(self._pieces.items()):
            for piece in [piece for piece, (since, _) in pieces.items() if since < before]:
                del pieces[piece]
                self._refused.setdefault(window, set()).add(piece)
                yield window, piece * PIECE, min((piece + 1) * PIECE, window.size)
            if not pieces:
                del self._pieces[window]

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
            for piece in pieces.keys() & range(first, last):
                if piece not in left:
                    del pieces[piece]
                yield window, piece * PIECE, min((piece + 1) * PIECE, window.size)
            if not pieces:
                del self._pieces[window]

    def forget(self, window: Window) -> None:
        """It is gone."""
        self._pieces.pop(window, None)
        self._refused.pop(window, None)
