"""What the mount shows of regions and only their pagers know.

A pager is asked, with a deadline.  If it does not answer, what it said last is shown, and
marked as old: so a pager that hangs keeps nobody from looking.
"""

from __future__ import annotations

import errno
import os
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, Literal, Protocol

from msharefsd.errors import Refused
from msharefsd.mount.names import Name
from msharefsd.region.texts import without_range

Text = Literal["info", "maps", "sharers", "pagetables"]

TEXT_SECONDS: Final = 2.0
"""How long a text is waited for; `pagetables` measures, and takes up to 5 seconds."""
PAGETABLES_SECONDS: Final = 8.0
MOST_WAITING: Final = 16
"""How many questions of one user's may wait: pyfuse3 has 99 workers."""
MOST_REMEMBERED: Final = 4 << 20
LARGEST_REMEMBERED: Final = 64 << 10
"""How much text is kept for a pager that does not answer, in all and of one (bytes)."""


class Pagers(Protocol):
    """Who answers."""

    async def text(self, home: int, kind: Text, number: int, seconds: float) -> bytes | int | None:
        """A text, or the errno that the pager gave; None if it did not answer in time."""

    async def metrics(self, uid: int) -> bytes:
        """OpenMetrics text, for a user."""

    def status(self, uid: int) -> bytes:
        """Which daemon this is, for a user."""


class Asking:
    """Asks, waits, and remembers."""

    def __init__(self, pagers: Pagers) -> None:
        self._pagers = pagers
        self._waiting: Counter[int] = Counter()
        self._known: OrderedDict[tuple[int, str], tuple[float, bytes]] = OrderedDict()
        self._held = 0

    @asynccontextmanager
    async def _one_of(self, uid: int) -> AsyncIterator[None]:
        if self._waiting[uid] >= MOST_WAITING:
            raise Refused(errno.EAGAIN, "too many readers: try again")
        self._waiting[uid] += 1
        try:
            yield
        finally:
            self._waiting[uid] -= 1
            if not self._waiting[uid]:
                del self._waiting[uid]

    async def text(self, uid: int, region: Name, kind: Text) -> bytes:
        """One of a region's texts, for a user.  Raises Refused."""
        if not region.size:
            return os.fsencode(without_range(region.record(), kind))
        seconds = PAGETABLES_SECONDS if kind == "pagetables" else TEXT_SECONDS
        async with self._one_of(uid):
            got = await self._pagers.text(region.home, kind, region.id, seconds)
        if isinstance(got, int):
            raise Refused(got, "the pager cannot tell")
        if got is None:
            return self._old(region, kind)
        self._remember((region.id, kind), got)
        return got

    def _remember(self, key: tuple[int, str], text: bytes) -> None:
        self._held -= len(self._known.pop(key, (0.0, b""))[1])
        if len(text) > LARGEST_REMEMBERED:
            return
        self._known[key] = time.time(), text
        self._held += len(text)
        while self._held > MOST_REMEMBERED:
            self._held -= len(self._known.popitem(last=False)[1][1])

    def _old(self, region: Name, kind: Text) -> bytes:
        when, text = self._known.get((region.id, kind), (0.0, b""))
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when)) if when else "never"
        mark = f"old: {since} (the pager of user {region.home} does not answer)\n"
        if not text and kind == "info":
            text = os.fsencode(without_range(region.record(), kind))
        return (b"" if kind == "info" else b"# ") + os.fsencode(mark) + text

    async def metrics(self, uid: int) -> bytes:
        """What is counted, for a user.  Raises Refused."""
        async with self._one_of(uid):
            return await self._pagers.metrics(uid)

    def status(self, uid: int) -> bytes:
        """Which daemon this is, for a user: what the front knows without asking."""
        return self._pagers.status(uid)
