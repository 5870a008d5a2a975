"""What goes out of a region: in pieces, with pauses, and nobody in between.

A user decides how much there is of it.  So each of these looks at what is there and no
more, and lets others in; and who faults in what leaves waits until it has gone.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterable, Iterator
from typing import Final

from msharefsd.errors import Refused
from msharefsd.linux.syscalls import HUGE_PAGE
from msharefsd.paging import protection
from msharefsd.paging.pages import pages_of
from msharefsd.region.objects import Object
from msharefsd.region.region import Region
from msharefsd.threads.breath import Breath

log = logging.getLogger(__name__)

AT_ONE_TIME: Final = 256
"""How many objects change in one piece, between two pauses."""


@contextlib.contextmanager
def leaving(region: Region, start: int, end: int) -> Iterator[None]:
    """Whoever faults in [start, end) waits until what is there has been replaced."""
    pages = pages_of(region)
    pages.leaving.add(start, end)
    try:
        yield
    finally:
        pages.leaving.clear()
        if pages.held or pages.awaiting:
            pages.held = False
            protection.wake(region, start, end)


async def some_private(region: Region, start: int, end: int) -> list[Object]:
    """The first private parts in [start, end), not too many at one time."""
    found: list[Object] = []
    breath = Breath()
    while len(found) < AT_ONE_TIME and (item := region.objects.first(start, end)) is not None:
        if item.private:
            found.append(item)
        start = item.end
        await breath.take()
    return found


async def plan(
    runs: Iterable[tuple[int, int]], step: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """How to take runs of pages away: what to arm, and what to move at one time.

    Armed are spans, gaps of less than `step` with them: a window is one VMA for each, and
    a process may have so many of them.  Moved is what lies in one aligned step.
    """
    spans: list[tuple[int, int]] = []
    parts: list[tuple[int, int]] = []
    breath = Breath()
    for start, end in runs:
        for at in range(start - start % step, end, step):
            low, high = max(at, start), min(at + step, end)
            if parts and low // step == parts[-1][0] // step:
                parts[-1] = (parts[-1][0], high)
            else:
                parts.append((low, high))
            if spans and low - spans[-1][1] < step:
                spans[-1] = (spans[-1][0], high)
            else:
                spans.append((low, high))
            await breath.take()
    return spans, parts


async def clean(region: Region, start: int, end: int) -> None:
    """Nothing in the range is dirty any more; if anything was, a file did not take it.

    As in the kernel, munmap() succeeds all the same.  Nobody writes there meanwhile.
    """
    dirty, breath, lost = pages_of(region).dirty, Breath(), 0
    while (found := dirty.file_at(start, end)) is not None:
        dirty.discard(found[0])
        lost += region.page
        await breath.take()
    if lost:
        log.error("region %s: unmapped %d bytes that a file did not take", region.label(), lost)


async def discard(region: Region, offset: int, length: int) -> None:
    """Free the memory of a range, whether it is in the backing or in the stash."""
    alive(region)
    assert region.backing is not None
    await region.backing.discard(offset, length)
    region.account.freed()
    first = offset - offset % HUGE_PAGE
    pages = pages_of(region)
    if length // HUGE_PAGE < len(pages.collapsed):
        pages.collapsed.difference_update(range(first, offset + length, HUGE_PAGE))
    else:
        pages.collapsed = {
            chunk for chunk in pages.collapsed if not first <= chunk < offset + length
        }


def alive(region: Region) -> None:
    """Raise Refused(ENOENT) if the region's memory is gone."""
    if region.backing is None:
        raise Refused(errno.ENOENT, "the region is gone")


def let_go(region: Region, removed: list[Object]) -> None:
    """Close the files of which nothing is mapped any more."""
    for file in dict.fromkeys(item.file for item in removed if item.file is not None):
        if not region.objects.uses(file):
            file.let_go()
