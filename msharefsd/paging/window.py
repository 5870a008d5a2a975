"""Where an address space has the region: its window, or the pager's host mapping.

Inside of the page server a region is offsets, from 0 to its size.  Here they become
addresses, and nowhere else.  And nowhere else is a call made on the address space of a
sharer by its userfaultfd: of a process of another user that goes through a lane, and may be
late (lanes.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final, Protocol

import trio

from msharefsd.linux import uffd
from msharefsd.linux.uffd import Fault, Inherited, Mode, Outcome
from msharefsd.paging.chunks import Chunks
from msharefsd.paging.lanes import Far
from msharefsd.region.ranges import Ranges
from msharefsd.region.region import Region, Sharer

_SMALLEST_CHUNK: Final = 64 << 10
_LARGEST_CHUNK: Final = 2 << 20


class Holder(Protocol):
    """Who has a userfaultfd."""

    @property
    def uffd(self) -> int:
        """Its userfaultfd, now."""


class Mapping:
    """The region in one address space, with the ioctls of its userfaultfd.

    Offsets are bytes from the region's start.  The operations are uffd.py's.  What can be
    late is so in a Window only.
    """

    def __init__(self, holder: Holder, start: int) -> None:
        """`start`: the address of the region's first byte there."""
        self._holder = holder
        self.start = start
        self.far: Far | None = None
        """Its userfaultfd, if it is of a process of another user."""

    # -- what need not happen: late, it is done another time or in another way --

    def wake(self, start: int, end: int) -> None:
        """Let every thread that waits for a page in the range look again, soon."""
        if self.far is None:
            uffd.wake(self._holder.uffd, self.start + start, end - start)
        else:
            self.far.wake(self.start + start, end - start)

    def zeropage(self, start: int, end: int, *, protect: bool) -> tuple[int, Outcome]:
        """Populate absent pages with zeros.  LATE: that will not happen any more.

        `protect`: only with `copies_zeros`.
        """
        if self.far is None:
            return uffd.zeropage(self._holder.uffd, self.start + start, end - start)
        return self.far.zeropage(self.start + start, end - start, protect=protect)

    @property
    def copies_zeros(self) -> bool:
        """Whether its zeros are copied, and so can be protected."""
        return self.far is not None

    def copy(self, start: int, end: int, source: int, *, protect: bool) -> tuple[int, Outcome]:
        """Populate absent pages from the address `source` of our own.

        LATE: that may happen as long as there is memory at `source`.
        """
        if self.far is None:
            fd, address = self._holder.uffd, self.start + start
            return uffd.copy(fd, address, source, end - start, protect=protect)
        return self.far.fill(uffd.copy, self.start + start, source, end - start, protect=protect)

    def poison(self, start: int, end: int) -> Outcome:
        """Have absent pages raise SIGBUS."""
        if self.far is None:
            return uffd.poison(self._holder.uffd, self.start + start, end - start)[1]
        return self.far.fill(uffd.poison, self.start + start, end - start)[1]

    def map_present(self, start: int, end: int, *, protect: bool) -> tuple[int, Outcome]:
        """Map what the backing has already."""
        address, length = self.start + start, end - start
        if self.far is None:
            return uffd.map_present(self._holder.uffd, address, length, protect=protect)
        return self.far.fill(uffd.map_present, address, length, protect=protect)

    def register_plain(self, start: int, end: int) -> None:
        """Take every mode but MISSING away: the kernel can only take all, and add again."""
        address, length = self.start + start, end - start
        if self.far is None:
            _register_plain(self._holder.uffd, address, length)
        else:
            self.far.attempt(_register_plain, address, length)

    def unprotect(self, start: int, end: int, *, wake: bool = True) -> None:
        """Let writes through."""
        address, length = self.start + start, end - start
        if self.far is None:
            uffd.write_unprotect(self._holder.uffd, address, length, wake=wake)
        else:
            self.far.attempt(uffd.write_unprotect, address, length, wake=wake)

    def is_gone(self) -> bool:
        """Whether the address space is known to exist no longer."""
        return uffd.is_gone(self._holder.uffd) if self.far is None else self.far.is_gone()

    # -- what others rely on: late, it is under way --

    def register(self, start: int, end: int, mode: Mode) -> bool:
        """Register for these modes and no others; whether that has been done."""
        address, length = self.start + start, end - start
        if self.far is not None:
            return self.far.state(uffd.register, address, length, mode)
        uffd.register(self._holder.uffd, address, length, mode)
        return True

    def protect(self, start: int, end: int) -> bool:
        """Have writes reported; whether that is so."""
        address, length = self.start + start, end - start
        if self.far is not None:
            return self.far.state(uffd.write_protect, address, length)
        uffd.write_protect(self._holder.uffd, address, length)
        return True


def _register_plain(fd: int, address: int, length: int) -> None:
    uffd.unregister(fd, address, length)
    uffd.register(fd, address, length, Mode.MISSING)


class Window(Mapping):
    """A sharer's, and what paging knows of the sharer beside that."""

    def __init__(self, sharer: Sharer) -> None:
        super().__init__(sharer, sharer.region.start)
        self.sharer = sharer
        self.region: Region = sharer.region
        self.size = sharer.region.size
        backing = sharer.region.backing
        self.chunks = Chunks(
            backing.smallest_chunk if backing else _SMALLEST_CHUNK,
            backing.largest_chunk if backing else _LARGEST_CHUNK,
        )
        self.poisoned = Ranges()
        """What raises SIGBUS in this process without asking us: see poison.py."""
        self.starved = Ranges()
        """What of that is to be populated as soon as it can be: see hunger.py."""
        self.threads: dict[int, int] = {}
        """Threads as we number them, by their own numbers: see thread.py."""
        self.huge = True
        """Whether its process may have huge pages, as far as is known: see collapse.py."""
        self.markers = 0
        """How many of these have been put, to see whether any has been meanwhile."""
        self.ready = False
        """It has asked for what is protected since it mapped its window."""
        self.served = False
        """Whether what it has to say is read, or has been before."""
        self.missed: list[tuple[int, int]] = []
        """What could not be protected while its process forks: protection.py."""
        self.coming = False
        """Whether its process has inherited it, and it lacks what its parent's was given."""
        self.caught_up = trio.Event()
        """While it is behind for one of these: set when there is nothing of either kind."""

    @property
    def detached(self) -> bool:
        """Whether nothing can be asked of it any more."""
        return self.sharer.uffd < 0 if self.far is None else self.far.is_over

    @property
    def is_late(self) -> bool:
        """Whether what is asked of it now would be late."""
        return self.far is not None and self.far.is_late

    def protect(self, start: int, end: int) -> bool:
        """Have writes reported; whether that is so."""
        try:
            return super().protect(start, end)
        except BlockingIOError:  # EAGAIN: UFFDIO_WRITEPROTECT(2const)
            if self.far is not None:
                raise
            self.missed.append((start, end))
            return False

    async def level(self) -> None:
        """Wait until nothing that was asked of it is late, which is not for ever."""
        if self.far is not None:
            await self.far.level()

    async def faults(self, reader: uffd.Reader) -> Sequence[Fault | Inherited]:
        """The faults that wait, as soon as there are any; none if there are none after all."""
        if self.far is not None:
            return await self.far.faults()
        await trio.lowlevel.wait_readable(self.sharer.uffd)
        return reader.faults(self.sharer.uffd) if self.sharer.uffd >= 0 else []

    def faults_now(self, reader: uffd.Reader) -> Sequence[Fault | Inherited]:
        """The faults that wait, if that can be told without waiting and costs next to nothing."""
        if self.far is not None or self.sharer.uffd < 0 or not reader.nowait:
            return []
        return reader.faults(self.sharer.uffd)

    def unblock(self) -> None:
        """Somebody may have made it block."""
        if self.far is None:  # the lane does that itself
            os.set_blocking(self.sharer.uffd, False)

    @property
    def writable(self) -> bool:
        """Whether it is mapped shared: the sharer writes."""
        return self.sharer.writable

    @property
    def attached(self) -> bool:
        """Whether the sharer is one of the region's still, and the region has memory."""
        return self.sharer.number in self.region.sharers and self.region.backing is not None

    def page_of(self, address: int) -> int:
        """The offset of an address's page; outside of the region, if the address is."""
        offset = address - self.start
        return offset - offset % self.region.page


def window_of(sharer: Sharer) -> Window:
    """A sharer's window; made when it is first asked for."""
    window = sharer.paging
    if not isinstance(window, Window):
        window = sharer.paging = Window(sharer)
    return window
