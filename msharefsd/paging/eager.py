"""Looking for the next fault before going to sleep for it.

To be put to sleep and woken again costs more than to answer a fault, and who touches memory at
random places comes back within microseconds.  So whoever did so is expected to do so again: for
a moment its userfaultfd is read and read again.  Where nothing comes of that, because whoever
faults cannot run as long as we do or has other things to do, it is tried twice as seldom each
time.

It is for one process at a time, so nobody else waits for longer than IN_A_ROW faults and the
moments between them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

T = TypeVar("T")

MOMENT_SECONDS: Final = 50e-6
IN_A_ROW: Final = 8
MOST_PAUSES: Final = 1024
"""It is tried at least once in so many faults."""


class Eager:
    """Of one sharer."""

    def __init__(self) -> None:
        self._row = 0
        """How many have been found without going to sleep."""
        self._pauses = 1
        """How many times it is left out after the next failure."""
        self._left_out = 0

    @property
    def _is_due(self) -> bool:
        return self._left_out == 0

    def look(self, read: Callable[[], Sequence[T]]) -> Sequence[T]:
        """What `read`, which does not wait, has within a moment; nothing if it is not worth it."""
        if not self._is_due or self._row >= IN_A_ROW:
            self._left_out = max(0, self._left_out - 1)
            self._row = 0
            return ()
        until = time.perf_counter() + MOMENT_SECONDS
        while True:
            if found := read():
                self._row += 1
                self._pauses = 1
                return found
            if time.perf_counter() >= until:
                break
        self._row = 0
        self._left_out = self._pauses
        self._pauses = min(2 * self._pauses, MOST_PAUSES)
        return ()
