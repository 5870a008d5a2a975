"""Chunks that have been populated just now: huge pages of them are never cheaper.

What a huge page costs grows with the page tables that there are for it, and each sharer that
touches the chunk has one more.  So whoever populates tells it here, and who collapses
(collapse.py) need not look for it.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import Final

import trio

from msharefsd.linux.syscalls import HUGE_PAGE
from msharefsd.region.region import Region

MOST: Final = 4096
"""Chunks that are remembered, the newest; others are found by looking."""
RIPE_SECONDS: Final = 0.02
"""For so long a chunk is left to who has asked for it, who is about to write it: who touches
it while it is made a huge page waits."""


class Fresh:
    """Tells of them, if somebody wants to know."""

    def __init__(self) -> None:
        self.wanted = False
        self._chunks: OrderedDict[tuple[int, int], tuple[Region, float]] = OrderedDict()
        """By region id and offset: since when; the newest come last."""
        self._some = trio.Event()

    def add(self, region: Region, start: int, end: int) -> None:
        """[start, end) has been populated.

        Memory is filled upwards, mostly: a chunk whose end has come is likely to be whole.
        """
        if not self.wanted:
            return
        now = trio.current_time()
        for chunk in range(start - start % HUGE_PAGE, end - end % HUGE_PAGE, HUGE_PAGE):
            self._chunks.pop((region.id, chunk), None)
            self._chunks[region.id, chunk] = region, now
        while len(self._chunks) > MOST:
            self._chunks.popitem(last=False)
        self._some.set()

    async def ripe(self) -> None:
        """Until there may be one that is not left to anybody any more."""
        await self._some.wait()
        await trio.sleep(RIPE_SECONDS)

    def take(self, most: int) -> dict[Region, list[int]]:
        """The newest ripe ones, `most` of them; chunks upwards."""
        before = trio.current_time() - RIPE_SECONDS
        ripe = (key for key in reversed(self._chunks) if self._chunks[key][1] <= before)
        taken: dict[Region, list[int]] = {}
        for key in list(itertools.islice(ripe, most)):
            region, _ = self._chunks.pop(key)
            taken.setdefault(region, []).append(key[1])
        if not self._chunks:
            self._some = trio.Event()
        return {region: sorted(chunks) for region, chunks in taken.items()}
