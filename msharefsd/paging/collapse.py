"""Huge pages for memory that many share: it takes back their page tables.

A sharer's page table has an entry for each 4 KiB page that it has touched: 2 MiB of
them a GiB, in each of thousands of processes.  MADV_COLLAPSE makes one huge page of
the 512 small ones of a 2 MiB chunk in the backing, and the kernel then removes the
page tables of *all* who have it mapped (retract_page_tables(), mm/khugepaged.c), also
where /dev/shm is mounted huge=never.  The next touch maps the huge page in one entry.

It is asked for by process_madvise(2) in the name of the sharer that populated the
chunk: so the huge page is charged where the small ones were.  No code of the sharer runs.
A process that has no huge pages (PR_SET_THP_DISABLE), or that we may not do that to, is
no reason for the others to do without: then it is asked for in another's name.

Left out are chunks that have a hole or an absent page (the kernel would have to fill
it behind the page server's back, and refuses), and those where something is
write-protected (protection is kept page by page).  A chunk costs milliseconds, so
they are done in a thread, one after the other, with pauses: this never takes more
than a part of a processor.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, TypeVar

import trio

from msharefsd.barriers import barrier
from msharefsd.linux import syscalls
from msharefsd.linux.syscalls import HUGE_PAGE
from msharefsd.memory.shmbacking import ShmBacking
from msharefsd.paging.pages import pages_of
from msharefsd.paging.window import window_of
from msharefsd.region.region import Region, Sharer
from msharefsd.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

T = TypeVar("T")

FEWEST_SHARERS: Final = 2
SHARE_OF_A_PROCESSOR: Final = 0.25
BATCH: Final = 64
"""Chunks found at once: what is true of them may change while they wait."""

CAP_SYS_NICE: Final = 23
MOST_SAID: Final = 1024
MOST_NAMES: Final = 8
"""In how many sharers' names one chunk is tried in one look."""

# EAGAIN, EBUSY: somebody uses the pages just now.  ENOMEM: no huge page to be had.
# ESRCH: the sharer is gone.
_LATER: Final = frozenset({errno.EAGAIN, errno.EBUSY, errno.ENOMEM, errno.ESRCH, errno.EFAULT})
# EINVAL: it has no huge pages; or something has changed meanwhile.
_NOT_THIS_ONE: Final = frozenset({errno.EINVAL, errno.EPERM, errno.ESRCH})


_REASONS: Final = {
    errno.EINVAL: "none of its sharers that were tried may have huge pages (PR_SET_THP_DISABLE), "
    "or what they have mapped has changed meanwhile",
    errno.EPERM: "no right to process_madvise(2) on its sharers",
}


class Collapser:
    """Collapses what several sharers have, every few seconds."""

    def __init__(self, metrics: Metrics, interval: float) -> None:
        """`interval`: seconds between two looks."""
        self._metrics = metrics
        self._interval = interval
        self._limiter = trio.CapacityLimiter(1)
        self._said: set[tuple[int, int]] = set()

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
        since = time.monotonic()
        code = 0
        for sharer in _in_whose_names(region, chunk):
            armed = any(True for _ in pages.armed.within(chunk, chunk + HUGE_PAGE))
            if armed or sharer.pidfd is None or sharer.uffd < 0:
                continue
            code = await self._in_name_of(sharer, chunk)
            window = window_of(sharer)
            window.huge = code not in (errno.EINVAL, errno.EPERM)
            if code not in _NOT_THIS_ONE:
                break
        if code:
            self._metrics.not_collapsed.labels(errno.errorcode.get(code, str(code))).inc()
            if code == errno.EPERM and not syscalls.capabilities() >> CAP_SYS_NICE & 1:
                raise PermissionError(code, os.strerror(code))
            self._say(region, code)
        taken = time.monotonic() - since
        await trio.sleep(taken * (1 / SHARE_OF_A_PROCESSOR - 1))

    def _say(self, region: Region, code: int) -> None:
        if code in _LATER or (region.id, code) in self._said:
            return
        if len(self._said) >= MOST_SAID:
            self._said.clear()
        self._said.add((region.id, code))
        why = _REASONS.get(code, os.strerror(code))
        level = logging.INFO if code in _REASONS else logging.WARNING
        log.log(level, "region %s: page tables stay as they are: %s", region.label(), why)

    async def _in_name_of(self, sharer: Sharer, chunk: int) -> int:
        """The errno, 0 if it is done."""
        region = sharer.region
        pages = pages_of(region)
        assert sharer.pidfd is not None
        pidfd = os.dup(sharer.pidfd)
        address = region.start + chunk
        pages.collapsed.add(chunk)  # before: what changes it meanwhile takes it out again
        barrier("collapse")
        try:
            await self._in_thread(
                partial(syscalls.process_madvise, pidfd, address, HUGE_PAGE, syscalls.MADV_COLLAPSE)
            )
            self._metrics.collapsed.inc()
        except OSError as error:
            pages.collapsed.discard(chunk)
            return error.errno or errno.EIO
        finally:
            os.close(pidfd)
        return 0

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(function, limiter=self._limiter)


def _in_whose_names(region: Region, chunk: int) -> list[Sharer]:
    """Who is to pay for a chunk: who populated it; else who writes, the oldest first.

    Those of whom it is known that they have no huge pages come last: that may have changed.
    """
    payer = region.sharers.get(pages_of(region).payers.get(chunk, 0))
    others = (each for each in region.sharers.values() if each.writable and each is not payer)
    first = [] if payer is None else [payer]
    found = first + list(itertools.islice(others, MOST_NAMES))
    return sorted(found, key=lambda each: not window_of(each).huge)[:MOST_NAMES]


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
