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
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Final

from libmshare import core, waiting
from libmshare.images.ahead import Ahead
from libmshare.images.manifest import Part
from libmshare.images.store import TRIES, Store
from libmshare.images.units import Unit, jobs_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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


class Memories:
    """Memfds that contents come in: the memory of one that has been used is used again.

    Synchronization: any thread may call any method.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[int] = []
        self._closed = False

    def close(self) -> None:
        """What is lent is closed when it comes back."""
        with self._lock:
            self._closed = True
            for memory in self._idle:
                os.close(memory)
            self._idle.clear()

    @contextlib.contextmanager
    def lent(self, unit: Unit) -> Iterator[int]:
        """One of a unit's length; zeros where none of its parts will come."""
        with self._lock:
            memory = self._idle.pop() if self._idle else -1
        if memory < 0:
            memory = os.memfd_create("mshare-part")
        try:
            if sum(part.length for part in unit.parts) < unit.end - unit.start:
                os.ftruncate(memory, 0)
            os.ftruncate(memory, unit.end - unit.start)
            yield memory
        except BaseException:
            os.close(memory)  # the pager may read it still, and must see nothing else in it
            raise
        with self._lock:
            if self._closed:
                os.close(memory)
            else:
                self._idle.append(memory)


class Bringing:
    """What is left to be brought; the threads share it, and each takes the next by `next()`."""

    def __init__(
        self,
        region: Region,
        units: list[Unit],
        awaited: list[tuple[int, int]],
        store: Store,
        total: int,
        ahead: Ahead,
    ) -> None:
        """`awaited`: what of the region waits (offsets, by offset); `total`: bytes of the image.

        `ahead`: what may be on its way already.
        """
        self._region = region
        self._store = store
        self._ahead = ahead
        self._memories = Memories()
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
        number = self._number(job[0].start)
        times = Counter((part.hash, part.length) for unit in job for part in unit.parts)
        several = {key: bytearray() for key, count in times.items() if count > 1}
        for unit in job:
            with self._memories.lent(unit) as memory:
                for part in unit.parts:
                    put = partial(_write, memory, part.offset - unit.start)
                    again = several.get((part.hash, part.length))
                    if again is None:
                        self._fetch(part, put)
                    else:
                        if not again:
                            again += bytes(part.length)
                            self._fetch(part, partial(_keep, again))
                        put(0, memoryview(again))
                address = self._region.start + unit.start
                with self._turns.turn(number):
                    wanted = core.mshare_fill(address, unit.end - unit.start, memory)
            self._brought(unit, wanted)

    def _fetch(self, part: Part, put: Callable[[int, memoryview], object]) -> None:
        pieces = self._ahead.take(part)
        if pieces is None:
            tries = 1 if self._ahead.was_long(part) else TRIES
            self._store.part(part.hash, part.length, put, tries)
            return
        at = 0
        for piece in pieces:
            put(at, piece)
            at += len(piece)

    def close(self) -> None:
        """Nothing is begun any more."""
        self._memories.close()

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


def _write(file: int, start: int, offset: int, data: memoryview) -> None:
    offset += start
    while data:
        done = os.pwrite(file, data, offset)
        data, offset = data[done:], offset + done


def _keep(memory: bytearray, offset: int, data: memoryview) -> None:
    memory[offset : offset + len(data)] = data


def _meets(ranges: list[tuple[int, int]], unit: Unit) -> bool:
    at = bisect.bisect_left(ranges, (unit.end, 0)) - 1
    return at >= 0 and ranges[at][1] > unit.start
