"""What each region holds, how many have it, counts, and who connects: for the front to see.

Every open(2) and stat(2) of a region's file shows it, and asking a pager for each would cost
as much as all the rest.  So a pager writes it down in memory that both have mapped, whenever
it has populated or freed something: a slot for each region.  What
sharers make or free by themselves, with the backing's descriptor, is seen when the pager
looks the next time.

The front makes the memory and seals its size: no pager can cut it under the front's eyes.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Final

SLOTS: Final = 1 << 16
_NUMBERS: Final = 5
"""Bytes, sharers, and what is counted (telemetry/counts.py)."""
NONE: Final = (0, 0, 0)
Numbers = tuple[int, int, int]

_SERVED: Final = SLOTS * _NUMBERS
"""After the slots: connections that there are, and those that there ever were."""
_SIZE: Final = 8 * (_SERVED + 2)
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
NOWHERE: Final = -1


def make() -> int:
    """A descriptor of a board's memory.  Raises OSError."""
    fd = os.memfd_create("msharefsd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, _SIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


class Board:
    """One side's view of it."""

    def __init__(self, fd: int) -> None:
        """`fd` stays the caller's.  Raises OSError."""
        self._memory = mmap.mmap(fd, _SIZE)
        self._slots = memoryview(self._memory).cast("Q")
        self._next = 0
        self._free: list[int] = []

    def take(self) -> int:
        """A slot of one's own, with 0 in it; NOWHERE if all are taken."""
        if self._free:
            return self._free.pop()
        if self._next == SLOTS:
            return NOWHERE
        self._next += 1
        return self._next - 1

    def give_back(self, slot: int) -> None:
        """It is free for another."""
        if slot != NOWHERE:
            self.set(slot, 0)
            self.set_sharers(slot, 0)
            self.set_counts(slot, NONE)
            self._free.append(slot)

    def set(self, slot: int, value: int) -> None:
        """Write bytes down."""
        if slot != NOWHERE:
            self._slots[slot * _NUMBERS] = max(value, 0)

    def set_sharers(self, slot: int, count: int) -> None:
        """Write down how many have it attached."""
        if slot != NOWHERE:
            self._slots[slot * _NUMBERS + 1] = count

    def set_counts(self, slot: int, numbers: Numbers) -> None:
        """Write down what is counted of it."""
        if slot != NOWHERE:
            at = slot * _NUMBERS + 2
            for place, number in enumerate(numbers, start=at):
                self._slots[place] = number

    def get(self, slot: int) -> int:
        """What is written there; 0 for no slot."""
        return self._slots[slot * _NUMBERS] if 0 <= slot < SLOTS else 0

    def sharers(self, slot: int) -> int:
        """As `get`, of sharers."""
        return self._slots[slot * _NUMBERS + 1] if 0 <= slot < SLOTS else 0

    def counts(self, slot: int) -> Numbers:
        """As `get`, of what is counted."""
        if not 0 <= slot < SLOTS:
            return NONE
        faults, populated, huge = self._slots[slot * _NUMBERS + 2 : (slot + 1) * _NUMBERS]
        return faults, populated, huge

    def connected(self, by: int) -> None:
        """A client has connected (1), or is done (-1)."""
        self._slots[_SERVED] += by
        self._slots[_SERVED + 1] += max(by, 0)

    def connections(self) -> tuple[int, int]:
        """How many there are of those that the pager has accepted, and how many there were."""
        return self._slots[_SERVED], self._slots[_SERVED + 1]

    def close(self) -> None:
        """Let go of it."""
        self._slots.release()
        self._memory.close()
