"""Everything goes, because it was asked for: memory, and what it is called.

Whoever has a region attached then is not to wait for what cannot come.  Poison would take a
page table for every page that is absent; so the memory's file is cut to nothing.  The kernel
looks at a file's end before it looks at userfaultfd (shmem_get_folio_gfp(), mm/shmem.c;
hugetlb_no_page(), mm/hugetlb.c): whatever is touched is SIGBUS at once, EFAULT in a system
call, in every process that has it mapped, and the memory is free.

What a file has not taken is not thrown away, unless the file is lost: that region stays as
it is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Iterable

import trio

from msharefsd.paging import protection
from msharefsd.paging.pages import pages_of
from msharefsd.region.region import Region
from msharefsd.region.registry import Regions

log = logging.getLogger(__name__)


async def remove_all(
    regions: Regions, finish: Callable[[Callable[[], Iterable[Region]]], Awaitable[None]]
) -> None:
    """Remove each region whose files have what was written to it.

    Nobody's faults are served any more, so `finish`, which writes back, leaves nothing
    dirty but what a file does not take.
    """
    await finish(regions.alive)
    regions.release = Region.close_memory
    for region in list(regions.alive()):
        dirty = pages_of(region).dirty
        unwritten = len(dirty) * region.page
        if dirty and not dirty.lost:
            log.error(
                "region %s is kept: its files did not take %d bytes yet", region.label(), unwritten
            )
        else:
            if dirty:
                log.error(
                    "region %s is gone with %d bytes: nobody has its files any more",
                    region.label(),
                    unwritten,
                )
            await _cut(region)
            regions.remove(region)


async def _cut(region: Region) -> None:
    """Nobody has its memory any more, and nobody waits for it."""
    backing = region.backing
    assert backing is not None
    try:
        await trio.to_thread.run_sync(os.ftruncate, backing.fd, 0)
    except OSError as error:
        log.error("region %s: cannot free its memory: %s", region.label(), error.strerror)
    for sharer in region.sharers.values():
        protection.wake_sharer(sharer)
