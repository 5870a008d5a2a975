"""Want of memory: faults for which there is none.

Such a page is poisoned: SIGBUS.  But unlike a hole it is the region's, so it is tried
again once a second until it can be had.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import trio

from msharefsd.paging.pages import pages_of
from msharefsd.paging.window import Window
from msharefsd.region.objects import Object
from msharefsd.telemetry.seldom import Seldom
from msharefsd.threads.breath import Breath

log = logging.getLogger(__name__)

MEND_INTERVAL: Final = 1.0

Repair = Callable[[Window, Object, int, int], int]
"""Populate poisoned pages [start, end) of an object in a sharer: up to where it came.

That is `start` if there is no memory.
"""


class Hunger:
    """Knows who wants memory, and comes back to them."""

    def __init__(self) -> None:
        self._starving: set[Window] = set()
        self._any = trio.Event()
        self._seldom = Seldom()

    def notice(self, window: Window, start: int, end: int) -> None:
        """What is poisoned there, and an object's, is to be populated as soon as it can be."""
        window.starved.add(start, end)
        self.again(window)

    def again(self, window: Window) -> None:
        """Somebody serves it (again)."""
        if window.starved:
            self._starving.add(window)
            self._any.set()

    def forget(self, window: Window) -> None:
        """It is going."""
        self._starving.discard(window)

    def tell(self, window: Window) -> None:
        """For the administrator."""
        region = window.region
        if self._seldom.now(region.id):
            log.error(
                "region %s: no memory for a fault of process %d: SIGBUS (the region holds %d "
                "bytes, user %d's regions %d; see df /dev/shm and the daemon's limits)",
                region.label(),
                window.sharer.pid,
                region.allocated(),
                region.uid,
                region.account.memory(),
            )

    async def run(self, repair: Repair) -> None:
        """Once a second try again; forever."""
        while True:
            await self._any.wait()
            await trio.sleep(MEND_INTERVAL)
            for window in list(self._starving):
                await mend(window, repair)
                if not window.starved:
                    self._starving.discard(window)
            if not self._starving:
                self._any = trio.Event()


async def mend(window: Window, repair: Repair) -> None:
    """Populate what a sharer lacks, until there is no memory again.

    Nothing awaits between the look at the map and the repair.
    """
    region, pages, breath, at = window.region, pages_of(window.region), Breath(), 0
    while window.attached and (part := next(window.starved.within(at, window.size), None)):
        start, end = part
        found = region.objects.first(start, end)
        right = end if found is None else found.offset if found.accessible else found.end
        if right > start:
            window.starved.remove(start, right)  # the poison is right there now
        elif found is not None and pages.leaving.contains(start):
            at = found.end
        elif found is not None:
            at = repair(window, found, start, found.end)
            if at == start:
                return
        await breath.take()
