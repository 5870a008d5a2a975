"""Sharers without a connection: those that another daemon had, until they call.

A process does not notice that its daemon has died before it makes a call, which may be
never.  So its faults are served without its connection, and its end is known from its
pidfd, from its address space (exec), and from its userfaultfd: a library that gave up
the region while no daemon was there has closed that.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Final

import trio

from msharefsd.linux import processes, uffd
from msharefsd.linux.processes import Deaths
from msharefsd.paging.server import PageServer
from msharefsd.paging.window import window_of
from msharefsd.region.region import Region, Sharer, State
from msharefsd.region.registry import Regions

LOOK_SECONDS: Final = 5.0


@dataclass(eq=False, slots=True)
class _Orphan:
    sharer: Sharer
    pidfd: int
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: trio.Event = field(default_factory=trio.Event)


class Orphans:
    """Serves them, and hands them over to the connection that they make."""

    def __init__(self, regions: Regions, pages: PageServer, deaths: Deaths) -> None:
        self._regions = regions
        self._pages = pages
        self._deaths = deaths
        self._orphans: dict[Sharer, _Orphan] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Forever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            while True:
                await trio.sleep(LOOK_SECONDS)
                for sharer in list(self._orphans):
                    if not still_there(sharer):
                        self.end(sharer)

    def add(self, sharer: Sharer, pidfd: int) -> None:
        """Take a sharer in and serve its faults.  `pidfd` is taken over."""
        assert self._nursery is not None, "run() is not running"
        orphan = self._orphans[sharer] = _Orphan(sharer, pidfd)
        sharer.pidfd = pidfd
        sharer.ended = lambda: processes.has_ended(pidfd)
        sharer.dismiss = lambda: self._dismiss(sharer)
        self._deaths.watch(pidfd, lambda: self.end(sharer))
        self._nursery.start_soon(self._serve, orphan)

    async def _serve(self, orphan: _Orphan) -> None:
        try:
            with orphan.scope:
                await self._pages.serve(orphan.sharer)
        finally:
            orphan.done.set()

    def find(self, region: Region, pid: int) -> Sharer | None:
        """The process's attachment of that region, if it waits for a connection."""
        for sharer, orphan in self._orphans.items():
            here = sharer.region is region and sharer.pid == pid
            if here and not processes.has_ended(orphan.pidfd):
                return sharer
        return None

    def _take(self, sharer: Sharer) -> _Orphan:
        orphan = self._orphans.pop(sharer)
        orphan.scope.cancel()
        self._deaths.forget(orphan.pidfd)
        os.close(orphan.pidfd)
        sharer.pidfd = None
        sharer.ended = lambda: False
        return orphan

    async def hand_over(self, sharer: Sharer) -> None:
        """Nothing of it is ours any more when this returns, its userfaultfd neither."""
        with trio.CancelScope(shield=True):
            await self._take(sharer).done.wait()

    def _dismiss(self, sharer: Sharer) -> None:
        if sharer in self._orphans:
            self.end(sharer)

    def end(self, sharer: Sharer) -> None:
        """It has gone."""
        self._take(sharer)
        self._pages.close(sharer)
        if sharer.region.state is State.BUILDING:  # its donor: it is the only sharer
            self._regions.abandon(sharer.region)
        self._regions.detach(sharer)


def still_there(sharer: Sharer) -> bool:
    """Whether the process still holds the region, as far as can be told from outside."""
    try:
        if window_of(sharer).is_gone():
            return False
        return os.readlink(f"/proc/{sharer.pid}/fd/{sharer.uffd_number}") == uffd.LINK
    except PermissionError:
        return True  # not to be seen
    except OSError:
        return False
