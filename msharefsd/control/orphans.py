"""Sharers without a connection, until they make another one.

A process does not notice that its daemon has died before it makes a call, which may be
never.  And a process that closes its descriptors, whatever they are, closes ours with
them, and goes on to use its memory.  So its faults are served without its connection.

A sharer is its address space: as long as that has the window, absent pages of it have to
be guarded.  It may outlive the process that attached it (a clone with CLONE_VM), and end
before that does (exec).  What tells is the userfaultfd.  A library that gave up the
region while no daemon was there has unmapped the window, and closed its own copy.  Of a
process of another user its lane finds that out (lanes.py), and nobody waits for it.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from msharefsd.control.guards import Guards
from msharefsd.control.peer import Peer
from msharefsd.errors import Refused
from msharefsd.linux import processes, uffd
from msharefsd.linux.processes import Deaths
from msharefsd.linux.uffd import Guard
from msharefsd.paging import protection
from msharefsd.paging.pages import pages_of
from msharefsd.paging.server import PageServer
from msharefsd.paging.window import window_of
from msharefsd.region.region import Region, Sharer, State
from msharefsd.region.registry import Regions

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 5.0
ROOM_SECONDS: Final = 0.1


@dataclass(eq=False, slots=True)
class _Orphan:
    sharer: Sharer
    pidfd: int | None
    inherited: bool = False
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: trio.Event = field(default_factory=trio.Event)


class Orphans:
    """Serves them, and hands them over to the connection that they make."""

    def __init__(self, regions: Regions, pages: PageServer, deaths: Deaths, guards: Guards) -> None:
        self._regions = regions
        self._guards = guards
        self._pages = pages
        self._deaths = deaths
        pages.inherited, pages.room = self.inherit, self._room
        self._orphans: dict[Sharer, _Orphan] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Forever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            while True:
                await trio.sleep(LOOK_SECONDS)
                for orphan in list(self._orphans.values()):
                    self._look(orphan)

    def _look(self, orphan: _Orphan) -> None:
        """End it if it has the region no more; of another user's process that is found out."""
        sharer = orphan.sharer
        far = window_of(sharer).far
        if far is not None:
            far.look(partial(self._found, orphan), _ends(sharer.region), sharer.region.page)
        elif not still_there(sharer):
            self.end(sharer)

    def _found(self, orphan: _Orphan, guard: Guard) -> None:
        if self._orphans.get(orphan.sharer) is not orphan:
            return  # it has a connection again
        if guard is Guard.GONE or (guard is Guard.NOTHING and not _has_its_own(orphan.sharer)):
            self.end(orphan.sharer)

    def add(self, sharer: Sharer, pidfd: int | None) -> None:
        """Take a sharer in and serve its faults.  `pidfd` is taken over."""
        assert self._nursery is not None, "run() is not running"
        orphan = self._orphans[sharer] = _Orphan(sharer, pidfd)
        sharer.pidfd, sharer.note = pidfd, lambda: None
        sharer.dismiss = lambda: self._dismiss(sharer)
        if pidfd is None:
            sharer.pid, sharer.ended = 0, lambda: False
        else:
            sharer.ended = lambda: processes.has_ended(pidfd) and is_gone(sharer)
            self._deaths.watch(pidfd, lambda: self._ended(orphan))
        self._nursery.start_soon(self._serve, orphan)
        if window_of(sharer).far is not None:
            self._look(orphan)  # its process may have ended: that is how connections end

    def inherit(self, parent: Sharer, fd: int) -> None:
        """A child has the window of `parent` and nothing else: it is a sharer as well.

        libmshare keeps children from that (MADV_DONTFORK), so it comes of a call past it.
        Nobody can be told that there may be no more of them: but beyond the limit it is
        not served, and who made it is not served any more, until there is room.
        """
        assert self._nursery is not None, "run() is not running"
        os.set_blocking(fd, False)
        try:
            sharer = self._regions.attach(
                parent.region, 0, parent.uid, fd, writable=parent.writable
            )
        except Refused as refused:
            # To close it would be to have the child make zeros.
            log.error("a child of process %d waits for ever: %s", parent.pid, refused.message)
            return
        protection.is_coming(pages_of(sharer.region), window_of(sharer))
        poisoned = list(window_of(parent).poisoned)
        self._pages.poison.marks.restore(window_of(sharer), poisoned)
        orphan = self._orphans[sharer] = _Orphan(sharer, None, inherited=True)
        self._nursery.start_soon(self._serve, orphan)
        self._nursery.start_soon(self._keep, sharer, parent.pid)

    async def _keep(self, sharer: Sharer, parent: int) -> None:
        if sharer not in self._orphans:
            return  # it is gone, and what would be kept of it would stay
        try:
            await self._guards.keep(sharer)
        except Refused as refused:
            log.error("a child of process %d: %s", parent, refused.message)
        if sharer not in self._orphans:
            self._guards.drop(sharer.number)  # it ended while that was under way

    @staticmethod
    async def _room(sharer: Sharer) -> None:
        while sharer.account.has_too_many_sharers() and sharer.uffd >= 0:
            await trio.sleep(ROOM_SECONDS)

    def _ended(self, orphan: _Orphan) -> None:
        """The process has; others may have its address space still."""
        self._forget_process(orphan)
        self._look(orphan)

    def _forget_process(self, orphan: _Orphan) -> None:
        if orphan.pidfd is not None:
            self._deaths.forget(orphan.pidfd)
            os.close(orphan.pidfd)
        sharer, orphan.pidfd = orphan.sharer, None
        sharer.pid, sharer.pidfd, sharer.ended = 0, None, lambda: False

    async def _serve(self, orphan: _Orphan) -> None:
        try:
            with orphan.scope:
                if orphan.inherited:
                    await self._room(orphan.sharer)
                    # What was protected since the child was made.
                    await protection.admit(pages_of(orphan.sharer.region), orphan.sharer)
                await self._pages.serve(orphan.sharer)
        finally:
            window_of(orphan.sharer).coming = False
            orphan.done.set()

    def find(self, region: Region, peer: Peer) -> Sharer | None:
        """The attachment of that region by the peer's process, if it waits for a connection."""
        for sharer, orphan in self._orphans.items():
            if sharer.region is not region or sharer.pid != peer.pid or orphan.pidfd is None:
                continue
            if (
                peer.may_go_on(sharer.uid)
                and not processes.has_ended(orphan.pidfd)
                and not is_gone(sharer)
            ):
                return sharer
        return None

    def _take(self, sharer: Sharer) -> _Orphan:
        orphan = self._orphans.pop(sharer)
        orphan.scope.cancel()
        if orphan.pidfd is not None:
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
        self._guards.let_go(sharer)
        self._pages.close(sharer)
        if sharer.region.state is State.BUILDING:  # its donor: it is the only sharer
            self._regions.abandon(sharer.region)
        self._regions.detach(sharer)


def is_gone(sharer: Sharer) -> bool:
    """Whether its address space is."""
    window, region = window_of(sharer), sharer.region
    if window.far is not None:
        return window.is_gone()
    return uffd.guard_at(sharer.uffd, region.start, region.page) is Guard.GONE


def is_registered(sharer: Sharer) -> bool:
    """Whether it has a window; of a process of the owner's or root's.

    The first page may have been unmapped past the library, and so may the last one.
    """
    region = sharer.region
    return any(
        uffd.guard_at(sharer.uffd, address, region.page) is Guard.WINDOW
        for address in _ends(region)
    )


def _ends(region: Region) -> tuple[int, int]:
    return region.start, region.start + region.size - region.page


def still_there(sharer: Sharer) -> bool:
    """Whether it still has the region, as far as can be told from outside.

    Not of a process of another user, see Orphans.
    """
    return not is_gone(sharer) and (is_registered(sharer) or _has_its_own(sharer))


def _has_its_own(sharer: Sharer) -> bool:
    """Whether it has its userfaultfd: without a window it may be about to map it."""
    try:
        return os.readlink(f"/proc/{sharer.pid}/fd/{sharer.uffd_number}") == uffd.LINK
    except PermissionError:
        return True  # not to be seen
    except OSError:
        return False
