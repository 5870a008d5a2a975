"""What paging knows of a region: the pages behind its objects.

Pages are made when the region has memory and somebody first asks, and go with it
(Region.close_memory).  A Region itself has but a place where they hang.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import trio

from msharefsd.linux.syscalls import HUGE_PAGE
from msharefsd.linux.uffd import Fault, Mode
from msharefsd.memory.buffers import BUFFER
from msharefsd.memory.files import MappedFile
from msharefsd.paging.awaiting import Awaiting
from msharefsd.paging.dirty import Dirty
from msharefsd.paging.watch import Watch
from msharefsd.paging.window import Window, window_of
from msharefsd.region.ranges import Ranges
from msharefsd.region.region import Region


@dataclass(frozen=True, slots=True)
class Waiting:
    """A sharer that wants a page, and the fault if a thread waits in one."""

    window: Window
    offset: int
    fault: Fault | None
    end: int = 0
    """Without a fault: what it wants from `offset` on lies before this."""
    since: float = 0
    """When the fault was read (time.perf_counter())."""


@dataclass(eq=False, slots=True)
class Fill:
    """A piece of a chunk that is being read from a file, and who waits for it."""

    file: MappedFile
    start: int
    end: int
    file_offset: int
    window: Window
    """Whose fault it was."""
    rest: Iterator[tuple[int, int]]
    """The further pieces of the chunk."""
    waiting: list[Waiting] = field(default_factory=list)
    stale: bool = False
    """What it has read may be older than the call by which memory starts fresh."""
    finished: trio.Event = field(default_factory=trio.Event)
    """What was read is where it belongs, or cannot be had."""


@dataclass(eq=False, slots=True)
class Pages:
    """The pages of one region.  Offsets are bytes from its start."""

    region: Region
    armed: Ranges = field(default_factory=Ranges)
    """Where windows are registered for `modes`."""
    modes: Mode = Mode.MISSING | Mode.WP
    """For write protection, and in a region that is watched for looking at what is there."""
    watch: Watch | None = None
    """If somebody untrusted can read it: what belongs there."""
    dirty: Dirty = field(default_factory=Dirty)
    """Pages of shared file mappings that are to be written back."""
    awaiting: Awaiting = field(default_factory=Awaiting)
    """Who waits for contents that somebody is to bring."""
    leaving: Ranges = field(default_factory=Ranges)
    """Ranges that are being replaced: who faults there waits until that is done."""
    held: bool = False
    """Whether somebody waits in what is leaving."""
    behind: set[Window] = field(default_factory=set)
    """Writers' windows that are not protected, or registered, as they are to be: lanes.py."""
    held_behind: bool = False
    """Whether somebody waits for what would have to be protected in these."""
    payers: dict[int, int] = field(default_factory=dict)
    """Offset of a 2 MiB chunk: number of the sharer that populated of it last."""
    collapsed: set[int] = field(default_factory=set)
    """Offsets of chunks that are huge pages."""
    collapse_calls: Counter[str] = field(default_factory=Counter)
    """How often the kernel was asked for these, by what it said."""
    refused: set[Window] = field(default_factory=set)
    """Windows that have poisoned pages."""
    reading: int = 0
    """Bytes that are being read from files just now."""
    _fills: dict[int, list[Fill]] = field(default_factory=dict)
    """What is being read, by the piece of the region that it lies in."""

    @property
    def piece(self) -> int:
        """How much of a file is read at one time at the most, in bytes."""
        return max(BUFFER, self.region.page)

    def writers(self) -> Iterator[Window]:
        """The windows that need protection: readers' are read-only mappings."""
        return (window_of(each) for each in self.region.sharers.values() if each.writable)

    @property
    def looked_at(self) -> bool:
        """Whether windows are registered for looking at what comes into them."""
        return bool(self.modes & Mode.MINOR)

    def clean(self, start: int, end: int) -> None:
        """Take out what does not belong in [start, end)."""
        if self.watch is not None:
            self.watch.clean(start, end)

    def stash(self, start: int, end: int) -> None:
        """Move the pages of [start, end) to the stash: see Backing.stash_pages()."""
        assert self.region.backing is not None
        if self.watch is not None:
            self.watch.stash(start, end)
        else:
            self.region.backing.stash_pages(start, end - start)

    # -- what is being read: each fill lies in one piece --

    def begin(self, fill: Fill) -> None:
        """It is being read from now on."""
        self._fills.setdefault(fill.start // self.piece, []).append(fill)
        self.reading += fill.end - fill.start

    def done(self, fill: Fill) -> None:
        """It has been read."""
        number = fill.start // self.piece
        self._fills[number].remove(fill)
        if not self._fills[number]:
            del self._fills[number]
        self.reading -= fill.end - fill.start

    def filling(self, file: MappedFile | None, offset: int) -> Fill | None:
        """What reads the page at `offset` of that file just now, if anything does."""
        for fill in self._fills.get(offset // self.piece, ()):
            if fill.start <= offset < fill.end and fill.file is file and not fill.stale:
                return fill
        return None

    def fills(self, start: int, end: int) -> Iterator[Fill]:
        """What is being read of [start, end) just now."""
        first, last = start // self.piece, -(-end // self.piece)
        numbers = (
            range(first, last)
            if last - first < len(self._fills)
            else [number for number in self._fills if first <= number < last]
        )
        for number in numbers:
            for fill in self._fills.get(number, ()):
                if fill.start < end and start < fill.end:
                    yield fill


def count(region: Region) -> None:
    """Have its counts say what is in huge pages now."""
    if region.backing is None:
        region.counts.huge = 0
    elif region.page >= HUGE_PAGE:
        region.counts.huge = region.allocated()
    else:
        region.counts.huge = len(pages_of(region).collapsed) * HUGE_PAGE


def pages_of(region: Region) -> Pages:
    """The pages of a region."""
    pages = region.paging
    if not isinstance(pages, Pages):
        pages = region.paging = Pages(region)
    return pages
