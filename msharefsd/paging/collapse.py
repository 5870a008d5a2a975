"""Huge pages for memory that many share: it takes back their page tables.

A sharer's page table has an entry for each 4 KiB page that it has touched: 2 MiB of
them a GiB, in each of thousands of processes.  MADV_COLLAPSE makes one huge page of
the 512 small ones of a 2 MiB chunk in the backing, and the kernel then removes the
page tables of *all* who have it mapped (retract_page_tables(), mm/khugepaged.c), also
where /dev/shm is mounted huge=never.  The next touch maps the huge page in one entry.

It is asked for by process_madvise(2) in the name of the sharer that populated the
chunk: so the huge page is charged where the small ones were.  No code of the sharer runs.

Left out are chunks that have a hole or an absent page (the kernel would have to fill
it behind the page server's back, and refuses), and those where something is
write-protected (protection is kept page by page).  A chunk costs milliseconds, so
they are done in a thread, one after the other, with pauses: this never takes more
than a part of a processor.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, TypeVar

import trio

from msharefsd.barriers import barrier
from msharefsd.linux.syscalls import HUGE_PAGE
from msharefsd.memory.shmbacking import ShmBacking
from msharefsd.paging.pages import pages_of
from msharefsd.region.region import Region, Sharer
from msharefsd.telemetry.metrics import Metrics
from msharetables import calls

log = logging.getLogger(__name__)

T = TypeVar("T")

FEWEST_SHARERS: Final = 2
SHARE_OF_A_PROCESSOR: Final = 0.25
BATCH: Final = 64
"""Chunks found at once: what is true of them may change while they wait."""

# EAGAIN, EBUSY: somebody uses the pages just now.  ENOMEM: no huge page to be had.
# EINVAL: changed meanwhile.  ESRCH: the sharer is gone.
_LATER: Final = frozenset(
    {errno.EAGAIN, errno.EBUSY, errno.ENOMEM, errno.EINVAL, errno.ESRCH, errno.EFAULT}
)


class Collapser:
    """Collapses what several sharers have, every few seconds."""

    def __init__(self, metrics: Metrics, interval: float) -> None:
        """`interval`: seconds between two looks."""
        self._metrics = metrics
        self._interval = interval
        self._limiter = trio.CapacityLimiter(1)

    async def run(self, regions: Callable[[], Iterable[Region]]) -> None:
        """Look, collapse, pause; forever, or until it turns out to be not allowed."""
        while True:
            await trio.sleep(self._interval)
            for region in list(regions()):
                if not isinstance(region.backing, ShmBacking):
                    continue  # its pages are huge already
                try:
                    await self._region(region)
                except PermissionError:
                    log.warning(
                        "no right to process_madvise(2) on sharers (CAP_SYS_NICE): their page "
                        "tables stay as they are"
                    )
                    return

    async def _region(self, region: Region) -> None:
        offset = 0
        while len(region.sharers) >= FEWEST_SHARERS and region.backing is not None:
            plain = [(item.offset, item.end) for item in region.objects if not item.guarded]
            fd = os.dup(region.backing.fd)  # the region may go while the thread looks
            try:
                chunks = await self._in_thread(partial(_populated, fd, plain, offset))
            finally:
                os.close(fd)
            for chunk in chunks:
                offset = chunk + HUGE_PAGE
                if chunk not in pages_of(region).collapsed:
                    await self._chunk(region, chunk)
            if len(chunks) < BATCH:
                return

    async def _chunk(self, region: Region, chunk: int) -> None:
        pages = pages_of(region)
        sharer = _in_whose_name(region, chunk)
        armed = any(True for _ in pages.armed.within(chunk, chunk + HUGE_PAGE))
        if sharer is None or sharer.pidfd is None or armed:
            return
        pidfd = os.dup(sharer.pidfd)
        address = region.start + chunk
        pages.collapsed.add(chunk)  # before: what changes it meanwhile takes it out again
        since = time.monotonic()
        barrier("collapse")
        try:
            await self._in_thread(
                partial(calls.process_madvise, pidfd, address, HUGE_PAGE, calls.MADV_COLLAPSE)
            )
            self._metrics.collapsed.inc()
        except OSError as error:
            pages.collapsed.discard(chunk)
            if error.errno == errno.EPERM:
                raise
            if error.errno not in _LATER:
                log.warning("region %s: cannot collapse: %s", region.label(), error.strerror)
        finally:
            os.close(pidfd)
        taken = time.monotonic() - since
        await trio.sleep(taken * (1 / SHARE_OF_A_PROCESSOR - 1))

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(function, limiter=self._limiter)


def _in_whose_name(region: Region, chunk: int) -> Sharer | None:
    """Who pays for a chunk: who populated it, or the oldest sharer that writes."""
    payer = region.sharers.get(pages_of(region).payers.get(chunk, 0))
    return payer or next((each for each in region.sharers.values() if each.writable), None)


def _populated(fd: int, ranges: Iterable[tuple[int, int]], offset: int) -> list[int]:
    """The first chunks from `offset` on that lie in a range and are there as a whole.

    Not more than BATCH of them.
    """
    found: list[int] = []
    for start, end in ranges:
        at = max(start, offset)
        at += -at % HUGE_PAGE
        while at + HUGE_PAGE <= end:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
                at += -at % HUGE_PAGE
                absent = os.lseek(fd, at, os.SEEK_HOLE)
            except OSError:
                return found  # nothing more, or truncated by a sharer
            while at + HUGE_PAGE <= min(absent, end):
                found.append(at)
                if len(found) == BATCH:
                    return found
                at += HUGE_PAGE
            at = max(at, absent)
    return found
