"""Want of memory: faults for which there is none.

Such a page is poisoned: SIGBUS.  But unlike a hole it is the region's, so it is tried
again once a second until it can be had.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import trio

from msharefsd.paging.window import Window
from msharefsd.region.objects import Object
from msharefsd.telemetry.seldom import Seldom

log = logging.getLogger(__name__)

MEND_INTERVAL: Final = 1.0

Repair = Callable[[Window, Object, int], object]
"""Populate a poisoned page of an object in a sharer; notices anew if it could not."""


class Hunger:
    """Knows who wants memory, and comes back to them."""

    def __init__(self) -> None:
        self._starving: set[Window] = set()
        self._any = trio.Event()
        self._seldom = Seldom()

    def notice(self, window: Window, offset: int) -> None:
        """A poisoned page of an object is to be populated as soon as there is memory."""
        window.starved.add(offset)
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
                mend(window, repair)
                if not window.starved:
                    self._starving.discard(window)
            if not self._starving:
                self._any = trio.Event()


def mend(window: Window, repair: Repair) -> None:
    """Populate what a sharer lacks, until there is no memory again."""
    region = window.region
    for offset in sorted(window.starved):
        found = region.objects.find(offset)
        if region.backing is None or found is None or not found.accessible:
            window.starved.discard(offset)  # the poison is right now
            continue
        repair(window, found, offset)
        if offset in window.starved:
            return
