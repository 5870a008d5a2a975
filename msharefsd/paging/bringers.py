"""Who brings a region's contents, and what becomes of those who wait when nobody does any more.

Whoever brings says so again and again, however long its parts take, and each of its calls says
it, too.  Who touches what is missing waits for as long as that goes on.  Nobody who brings can
be heard of: then it waits for `patience` from when the last one was, or from when it began to
wait, whatever was later, because the next one may be on its way.  Then it is SIGBUS, and EFAULT
in a system call, by poison that is known and written down (poison.py).  Never is it zeros.

When somebody is heard of again, whoever touches another page waits as before; and poison goes
when what belongs there is brought (bringing.py).  Nothing of that is written down: the next
daemon has heard of nobody, and begins to count when it does.
"""

from __future__ import annotations

import logging
import time
from typing import Final

import trio

from msharefsd.paging import protection
from msharefsd.paging.pages import pages_of
from msharefsd.paging.window import Window
from msharefsd.region.region import Region, Sharer
from msharefsd.threads.breath import Breath

log = logging.getLogger(__name__)

PATIENCE: Final = 60.0
"""How long who waits goes on when nobody who brings is heard of (seconds): fill_seconds."""
_INTERVAL: Final = 0.5
"""How often that is looked at where something is missing (seconds)."""


class Bringers:
    """Knows of each region that is not filled whether somebody fills it."""

    def __init__(self) -> None:
        self.patience = PATIENCE
        self._unfilled: set[Region] = set()
        self._any = trio.Event()

    def heard(self, sharer: Sharer) -> None:
        """It says that it brings contents."""
        region = sharer.region
        pages_of(region).awaiting.brings(anew=region.bringer not in region.sharers)
        region.bringer = sharer.number
        if region.given_up:
            region.given_up = False
            log.info("region %s: process %d brings its contents now", region.label(), sharer.pid)
        self.notice(region)

    def waits(self, window: Window, offset: int) -> bool:
        """A thread touches what is missing; False if it is not to wait for it."""
        region = window.region
        self.notice(region)
        return pages_of(region).awaiting.add(window, offset)

    def notice(self, region: Region) -> None:
        """Contents of it are missing."""
        if region not in self._unfilled:
            self._unfilled.add(region)
            self._any.set()

    async def run(self) -> None:
        """Forever; nothing is done while nothing is missing."""
        while True:
            await self._any.wait()
            await trio.sleep(_INTERVAL)
            breath = Breath()
            for region in list(self._unfilled):
                if not self._look(region):
                    self._unfilled.discard(region)
                await breath.take()
            if not self._unfilled:
                self._any = trio.Event()

    def _look(self, region: Region) -> bool:
        """Whether it is to be looked at again, if nothing comes of it meanwhile."""
        if region.backing is None or not region.objects.awaited():
            region.bringer, region.given_up = 0, False
            return False
        awaiting = pages_of(region).awaiting
        before = time.monotonic() - self.patience
        if awaiting.heard >= before:
            return True
        if not region.given_up:
            region.given_up = True
            log.warning(
                "region %s: %d bytes of its contents are missing, and no process that brings them "
                "was heard of for %g seconds: who touches them has SIGBUS (`mshare pull` of the "
                "same image goes on with it)",
                region.label(),
                region.objects.awaited(),
                self.patience,
            )
        for window, low, high in awaiting.refuse(before):
            if window.attached:
                protection.attempt(window.wake, low, high)
        return bool(awaiting)
