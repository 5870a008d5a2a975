"""What is known of markers of poison: ranges of each window, written down.

So many for all sharers of a user together, in memory and in the journal: an attachment
costs nobody anything, and so it must not bring room for more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from msharefsd.journal.journal import Journal
from msharefsd.paging.pages import pages_of
from msharefsd.paging.window import Window

MOST_RANGES: Final = 1 << 15
"""How many poisoned ranges are known of a user's sharers."""


class Marks:
    """Keeps `Window.poisoned`, the journal, and who is `refused`, in step."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._ranges: Counter[int] = Counter()
        """How many are known of each user's."""

    def remember(self, window: Window, start: int, end: int) -> bool:
        """Write down that [start, end) is poisoned; False if the user has too many."""
        before = window.poisoned.touching(start, end)
        if not before and self._ranges[window.sharer.uid] >= MOST_RANGES:
            return False
        window.poisoned.add(start, end)
        now = window.poisoned.find(start)
        assert now is not None
        self._change(window, [low for low, _ in before], [now])
        pages_of(window.region).refused.add(window)
        return True

    def strike(self, window: Window, start: int, end: int) -> None:
        """Nothing in [start, end) is poisoned any more."""
        parts = list(window.poisoned.within(start, end))
        window.starved.remove(start, end)
        if not parts:
            return
        before = [whole for low, _ in parts if (whole := window.poisoned.find(low))]
        window.poisoned.remove(start, end)
        now = [(low, start) for low, _ in before if low < start]
        now += [(end, high) for _, high in before if end < high]
        self._change(window, [low for low, _ in before], now)
        if not window.poisoned:
            pages_of(window.region).refused.discard(window)

    def _change(self, window: Window, gone: list[int], now: list[tuple[int, int]]) -> None:
        self._journal.change_poisoned(window.sharer.number, gone, now)
        self._ranges[window.sharer.uid] += len(now) - len(gone)

    def restore(self, window: Window, ranges: Iterable[tuple[int, int]]) -> None:
        """What another daemon knew."""
        for start, end in ranges:
            window.poisoned.add(start, end)
        if window.poisoned:
            self._ranges[window.sharer.uid] += len(window.poisoned)
            pages_of(window.region).refused.add(window)

    def forget(self, window: Window) -> None:
        """It is being detached."""
        self._ranges[window.sharer.uid] -= len(window.poisoned)
        if not self._ranges[window.sharer.uid]:
            del self._ranges[window.sharer.uid]
        window.poisoned.clear()
        window.starved.clear()
        pages_of(window.region).refused.discard(window)
