"""What a connection has made of its process: a sharer, a donor, or nothing yet."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

import trio

from msharefsd.control.control import Control
from msharefsd.control.orphans import still_there
from msharefsd.control.peer import Peer
from msharefsd.errors import Refused
from msharefsd.paging.window import window_of
from msharefsd.region.region import Region, Sharer
from msharefsd.region.registry import is_last

BUILDING_SECONDS: Final = 15.0
"""How long others wait for a donor that neither maps anything nor fills memory."""


class Sharing:
    """The state of one connection, and how it ends."""

    def __init__(
        self, control: Control, peer: Peer, region: Region | None, note: Callable[[], None]
    ) -> None:
        """`region`: what the connection's first message proves a right to, if anything."""
        self.control = control
        self.peer = peer
        self.region = region
        self.nursery: trio.Nursery | None = None
        self.sharer: Sharer | None = None
        self.building: Region | None = None
        self._note = note
        self._serving, self._served = trio.CancelScope(), trio.Event()
        self._calls = 0

    # -- beginning --

    def join(self, sharer: Sharer) -> None:
        """It is a sharer from now on: serve its faults."""
        assert self.nursery is not None
        self.sharer = sharer
        self.control.joined[sharer] = self.hand_over
        self._serving, self._served = trio.CancelScope(), trio.Event()
        self.nursery.start_soon(self._serve_faults, sharer, self._serving)
        sharer.note = self._note
        sharer.dismiss = self.nursery.cancel_scope.cancel

    async def _serve_faults(self, sharer: Sharer, scope: trio.CancelScope) -> None:
        served = self._served
        try:
            with scope:
                await self.control.pages.serve(sharer)
        finally:
            served.set()

    def build(self, region: Region) -> None:
        """It is a donor from now on: others wait for it, though not for ever."""
        assert self.nursery is not None
        self.building = region
        self.nursery.start_soon(self._watch_building, region)

    def progress(self) -> None:
        """A call has brought the donation on."""
        self._calls += 1

    async def _watch_building(self, region: Region) -> None:
        """Hang up on a donor that makes no progress.

        Copying takes as long as it takes, and fills memory meanwhile.
        """
        before: tuple[int, int] | None = None
        while self.building is region:
            now = self._calls, region.allocated()
            if now == before:
                assert self.nursery is not None
                self.nursery.cancel_scope.cancel()
                return
            before = now
            await trio.sleep(BUILDING_SECONDS)

    # -- asking --

    def need_attached(self) -> Sharer:
        """The sharer that it is.  Raises Refused(ENOTCONN)."""
        if self.sharer is None:
            raise Refused(errno.ENOTCONN, "this connection has attached no region")
        return self.sharer

    def need_sharer(self) -> Sharer:
        """As need_attached(), and no donor any more."""
        sharer = self.need_attached()
        if self.building is not None:
            raise Refused(errno.EINVAL, "COMMIT or hang up first")
        return sharer

    # -- ending --

    async def give_up(self) -> None:
        """It is a sharer no more, as it says; the name that it made for nothing is gone, too."""
        building = self.building
        if building is not None and building.made_file and building.linked:
            await self.control.front.unlink(building)
            self.control.regions.unlinked(building)
        self.detach()

    async def detach_and_unlink(self) -> None:
        """mshare_unlink() by a sharer: the last one takes the name with it.

        Unless it may not: the root directory is sticky, so only the owner and root
        remove a name (the check of the kernel's unlink(2), made here because no
        system call does it for us).
        """
        sharer = self.need_attached()
        region = sharer.region
        may = sharer.uid in (0, region.uid)
        if region.linked and may and is_last(sharer) and self.building is None:
            await self.control.front.unlink(region)
            self.control.regions.unlinked(region)
        self.detach()

    def leave_alone(self) -> Sharer | None:
        """Its connection ends; the sharer that it is nevertheless, for others to serve.

        A donor that has not finished is none: its own memory is still in the range.  Whether a
        process of another user is one is found out later (orphans.py).
        """
        sharer = self.sharer
        if sharer is None or self.building is not None:
            return None
        far = window_of(sharer).far
        if far.is_over if far is not None else not still_there(sharer):
            return None
        self._lose(sharer)
        return sharer

    async def hand_over(self) -> None:
        """Another connection of its process goes on; this one ends.

        A thread with descriptors of its own (CLONE_FILES) may have kept what the others
        have lost.  Raises Refused(ESTALE) of a donor.
        """
        sharer = self.need_attached()
        if self.building is not None:
            raise Refused(errno.ESTALE, "the region is being made by another connection")
        assert self.nursery is not None
        self._lose(sharer)
        self._serving.cancel()
        self.nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await self._served.wait()

    def leave(self) -> None:
        """The connection is over.

        Nothing refers to itself through it any more: what thousands of connections leave
        behind is freed at once then, and not all together by the garbage collector.
        """
        self.detach()
        self.nursery = None
        self._note = _nobody
        self._serving = trio.CancelScope()

    def detach(self) -> None:
        """It is a sharer no more; what it had begun to build is not there."""
        if self.building is not None:
            region, self.building = self.building, None
            self.control.regions.abandon(region)
        sharer = self.sharer
        if sharer is None:
            return
        self._serving.cancel()
        self.control.guards.let_go(sharer)
        self.control.pages.close(sharer)
        self._lose(sharer)
        self.control.regions.detach(sharer)

    def _lose(self, sharer: Sharer) -> None:
        self.sharer = None
        self.control.joined.pop(sharer, None)
        if sharer.region.creator == self.peer.pid:
            # It knows: from now on whoever says so is another.
            self.control.regions.forget_creator(sharer.region)
        sharer.note = _nobody


def _nobody() -> None:
    """There is nobody to tell."""
