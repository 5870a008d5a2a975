"""The parts of an image come to a region: fetched, and brought in one piece each.

In order; but what somebody waits for comes next, as the pager tells with each part that is
brought.  That is soon enough: before one is brought nobody can take up another one.

Parts that were asked for together come together, and the pager takes one after the other.  So
those who have one take turns: first what somebody waits for, and else in order.

Parts may take long, and the pager must not take us for gone meanwhile: so it is told again and
again that we are not.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import os
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from libmshare import core, waiting
from libmshare.images.store import Store
from libmshare.images.units import Unit, jobs_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from libmshare.region import Region


SAID_EVERY: Final = 1.0
"""How often the pager is told that this goes on, in seconds."""


def say(region: Region) -> int | None:
    """Tell that this process fills the region, and is at it; returns as core.mshare_fill()."""
    return waiting.interruptible(partial(core.mshare_fill, region.start, 0, -1))


class Turns:
    """One at a time, and of those who wait the most urgent one first, then by their numbers.

    Synchronization: any thread may call any method.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[int] = []
        self._urgent: set[int] = set()
        self._taken = False

    def urge(self, number: int) -> None:
        """Somebody waits for that one."""
        with self._changed:
            self._urgent.add(number)
            self._changed.notify_all()  # who was woken just now may not be the next one any more

    @contextlib.contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """It is the turn of that number."""
        with self._changed:
            self._waiting.append(number)
            self._changed.wait_for(lambda: not self._taken and self._next() == number)
            self._waiting.remove(number)
            self._taken = True
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()

    def _next(self) -> int:
        return min(self._waiting, key=lambda each: (each not in self._urgent, each))


class Bringing:
    """What is left to be brought; the threads share it, and each takes the next by `next()`."""

    def __init__(
        self,
        region: Region,
        units: list[Unit],
        awaited: list[tuple[int, int]],
        store: Store,
        total: int,
    ) -> None:
        """`awaited`: what of the region waits (offsets, by offset); `total`: bytes of the image."""
        self._region = region
        self._store = store
        left = [unit for unit in units if _meets(awaited, unit)]
        self._jobs = dict(enumerate(jobs_of(left)))
        self._order = collections.deque(self._jobs)
        self._wanted: collections.deque[int] = collections.deque()
        places = sorted((unit.start, number) for number, job in self._jobs.items() for unit in job)
        self._starts = [start for start, _ in places]
        self._numbers = [number for _, number in places]
        self._lock = threading.Lock()
        self._turns = Turns()
        self._said = time.monotonic()
        self.total = total
        """Bytes of contents."""
        self.done = total - sum(part.length for unit in left for part in unit.parts)
        """How many of them are there."""

    def __iter__(self) -> Bringing:
        return self

    def __next__(self) -> list[Unit]:
        with self._lock:
            for queue in (self._wanted, self._order):
                while queue:
                    job = self._jobs.pop(queue.popleft(), None)
                    if job is not None:
                        return job
        raise StopIteration

    def bring(self, job: list[Unit]) -> None:
        """Fetch the parts of some units, and put them in place.  Raises ImageError, OSError."""
        fetched: dict[tuple[str, int], memoryview] = {}
        number = self._number(job[0].start)
        for unit in job:
            memory = os.memfd_create("mshare-part")
            try:
                os.ftruncate(memory, unit.end - unit.start)
                for part in unit.parts:
                    key = part.hash, part.length
                    if key not in fetched:
                        fetched[key] = self._store.part(*key)
                    _write(memory, fetched[key], part.offset - unit.start)
                address = self._region.start + unit.start
                with self._turns.turn(number):
                    wanted = core.mshare_fill(address, unit.end - unit.start, memory)
            finally:
                os.close(memory)
            self._brought(unit, wanted)

    def go_on(self) -> None:
        """To be called again and again meanwhile, by the thread that waits for the others."""
        if time.monotonic() - self._said >= SAID_EVERY:
            self.heard(say(self._region))

    def _brought(self, unit: Unit, wanted: int | None) -> None:
        with self._lock:
            self.done += sum(part.length for part in unit.parts)
        self.heard(wanted)

    def heard(self, wanted: int | None) -> None:
        """The pager was told, and says where somebody waits."""
        with self._lock:
            self._said = time.monotonic()
            number = -1 if wanted is None else self._number(wanted)
            if number >= 0:
                self._wanted.append(number)
                self._turns.urge(number)

    def _number(self, offset: int) -> int:
        """The number of the job that has what is there, or before it; -1 if none has."""
        at = bisect.bisect_right(self._starts, offset) - 1
        return self._numbers[at] if at >= 0 else -1


def _write(file: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(file, data, offset)
        data, offset = data[done:], offset + done


def _meets(ranges: list[tuple[int, int]], unit: Unit) -> bool:
    at = bisect.bisect_left(ranges, (unit.end, 0)) - 1
    return at >= 0 and ranges[at][1] > unit.start
