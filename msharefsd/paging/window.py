"""Where an address space has the region: its window, or the pager's host mapping.

Inside of the page server a region is offsets, from 0 to its size.  Here they become
addresses, and nowhere else.
"""

from __future__ import annotations

from typing import Final, Protocol

from msharefsd.linux import uffd
from msharefsd.linux.uffd import Mode, Outcome
from msharefsd.paging.chunks import Chunks
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

    Offsets are bytes from the region's start.  The operations are uffd.py's.
    """

    def __init__(self, holder: Holder, start: int) -> None:
        """`start`: the address of the region's first byte there."""
        self._holder = holder
        self.start = start

    @property
    def uffd(self) -> int:
        """Its userfaultfd; -1 once it has been detached."""
        return self._holder.uffd

    def wake(self, start: int, end: int) -> None:
        """Let every thread that waits for a page in the range look again."""
        uffd.wake(self._holder.uffd, self.start + start, end - start)

    def zeropage(self, start: int, end: int) -> tuple[int, Outcome]:
        """Populate absent pages with zeros."""
        return uffd.zeropage(self._holder.uffd, self.start + start, end - start)

    def copy(self, start: int, end: int, source: int, *, protect: bool) -> tuple[int, Outcome]:
        """Populate absent pages from the address `source` of our own."""
        return uffd.copy(
            self._holder.uffd, self.start + start, source, end - start, protect=protect
        )

    def poison(self, start: int, end: int) -> Outcome:
        """Have absent pages raise SIGBUS."""
        return uffd.poison(self._holder.uffd, self.start + start, end - start)[1]

    def map_present(self, start: int, end: int, *, protect: bool) -> tuple[int, Outcome]:
        """Map what the backing has already."""
        return uffd.map_present(self._holder.uffd, self.start + start, end - start, protect=protect)

    def register(self, start: int, end: int, mode: Mode) -> None:
        """Register for these modes and no others."""
        uffd.register(self._holder.uffd, self.start + start, end - start, mode)

    def unregister(self, start: int, end: int) -> None:
        """Have nothing reported."""
        uffd.unregister(self._holder.uffd, self.start + start, end - start)

    def protect(self, start: int, end: int) -> None:
        """Have writes reported."""
        uffd.write_protect(self._holder.uffd, self.start + start, end - start)

    def unprotect(self, start: int, end: int, *, wake: bool = True) -> None:
        """Let writes through."""
        uffd.write_unprotect(self._holder.uffd, self.start + start, end - start, wake=wake)

    def is_gone(self) -> bool:
        """Whether the address space no longer exists."""
        return uffd.is_gone(self._holder.uffd)


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
        self.ready = False
        """It has asked for what is protected since it mapped its window."""

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
