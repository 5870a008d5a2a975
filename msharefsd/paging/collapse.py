"""Huge pages for memory that many share: it takes back their page tables.

What that is, and what it costs, says `msharetables.collapse`, which does it; here is which
chunks of a region it is done to, and in whose name: that of the sharer that populated the
chunk, so that the huge page is charged where the small ones were.
But for the address space of another user's process nobody waits here (lanes.py): then it is
in the name of the oldest sharer of the owner's, or not at all.

Left out are chunks that have a hole or an absent page (the kernel would have to fill
it behind the page server's back, and refuses), and those where something is
write-protected (protection is kept page by page).  A chunk costs milliseconds, and the
more the more sharers have touched it: so it is looked for often, while a region is being
filled, and done in a thread, with pauses: this never takes more than a part of a processor.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Final, TypeVar

import trio

from msharefsd.barriers import barrier
from msharefsd.linux.syscalls import HUGE_PAGE
from msharefsd.memory.shmbacking import ShmBacking
from msharefsd.paging.pages import pages_of
from msharefsd.paging.window import window_of
from msharefsd.region.region import Region, Sharer
from msharefsd.telemetry.metrics import Metrics
from msharetables import fill
from msharetables.collapse import (
    AT_ONCE_SECONDS,
    SECONDS_A_CHUNK,
    SECONDS_A_SHARER,
    Outcome,
    Pace,
    collapse,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

FEWEST_SHARERS: Final = 2
SHARE_OF_A_PROCESSOR: Final = 0.5
BATCH: Final = 64
"""Chunks found at once."""


class Collapser:
    """Collapses what several sharers have, every few seconds."""

    def __init__(self, metrics: Metrics, interval: float) -> None:
        """`interval`: seconds between two looks."""
        self._metrics = metrics
        self._interval = interval
        self._limiter = trio.CapacityLimiter(1)
        self._pace = Pace(SHARE_OF_A_PROCESSOR)
        self._seen: dict[int, tuple[int, ...]] = {}
        """By region id: how it was when there was nothing left to be done."""

    async def run(self, regions: Callable[[], Iterable[Region]]) -> None:
        """Look, collapse, pause; forever, or until it turns out to be not allowed."""
        while True:
            await trio.sleep(self._interval)
            alive = list(regions())
            numbers = {region.id for region in alive}
            self._seen = {each: how for each, how in self._seen.items() if each in numbers}
            for region in alive:
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
        if len(region.sharers) < FEWEST_SHARERS or region.backing is None:
            return
        how = _how(region)  # before: what changes while we look is to be seen the next time
        if self._seen.get(region.id) == how:
            return
        plain = [(item.offset, item.end) for item in region.objects if not item.guarded]
        fd = os.dup(region.backing.fd)  # the region may go while the thread looks
        idle = True
        try:
            found = fill.whole_chunks(fd, plain)
            while chunks := await self._in_thread(partial(_some, found)):
                for run in _runs(region, chunks):
                    idle = False
                    await self._run(region, *run)
        finally:
            os.close(fd)
        if idle:
            self._seen[region.id] = how

    async def _run(self, region: Region, payer: Sharer, chunks: Sequence[int]) -> None:
        """Chunks that lie behind each other."""
        pages = pages_of(region)
        # Looked at again: what was true of them may have changed while they waited.
        chunks = [chunk for chunk in chunks if _may_be(region, chunk)]
        if not chunks or payer.pidfd is None:
            return
        if chunks[-1] - chunks[0] != (len(chunks) - 1) * HUGE_PAGE:
            return  # next time
        pidfd = os.dup(payer.pidfd)
        address, length = region.start + chunks[0], len(chunks) * HUGE_PAGE
        pages.collapsed.update(chunks)  # before: what changes them meanwhile takes them out again
        barrier("collapse")
        outcome = Outcome.BUSY
        try:
            outcome, taken = await self._in_thread(partial(collapse, pidfd, address, length))
        except OSError as error:
            if error.errno == errno.EPERM:
                raise
            taken = 0.0
            log.warning("region %s: cannot collapse: %s", region.label(), error.strerror)
        finally:
            os.close(pidfd)
            if outcome is not Outcome.DONE:
                pages.collapsed.difference_update(chunks)
        if outcome is Outcome.DONE:
            self._metrics.collapsed.inc(len(chunks))
        await trio.sleep(self._pace.pause(taken))
        if outcome is not Outcome.DONE and len(chunks) > 1:
            for chunk in chunks:  # one of them, and nobody knows which
                await self._run(region, payer, [chunk])

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(function, limiter=self._limiter)


def _some(chunks: Iterator[int]) -> list[int]:
    return list(itertools.islice(chunks, BATCH))


def _how(region: Region) -> tuple[int, ...]:
    """What changes when there may be something to be done."""
    pages = pages_of(region)
    held = region.backing.allocated() if region.backing else 0
    return held, len(pages.collapsed), pages.armed.length, len(region.objects)


def _may_be(region: Region, chunk: int) -> bool:
    pages = pages_of(region)
    return chunk not in pages.collapsed and not any(
        True for _ in pages.armed.within(chunk, chunk + HUGE_PAGE)
    )


def _runs(region: Region, chunks: Iterable[int]) -> Iterator[tuple[Sharer, list[int]]]:
    """Who pays for which chunks, a few at a time that lie behind each other."""
    most = max(
        int(AT_ONCE_SECONDS / max(SECONDS_A_CHUNK, SECONDS_A_SHARER * len(region.sharers))), 1
    )
    run: list[int] = []
    payer: Sharer | None = None
    for chunk in chunks:
        if not _may_be(region, chunk):
            continue
        pays = _in_whose_name(region, chunk)
        if run and (pays is not payer or chunk != run[-1] + HUGE_PAGE or len(run) >= most):
            if payer is not None:
                yield payer, run
            run = []
        payer = pays
        run.append(chunk)
    if run and payer is not None:
        yield payer, run


def _in_whose_name(region: Region, chunk: int) -> Sharer | None:
    """Who pays for a chunk: who populated it, or the oldest sharer that writes."""
    payer = region.sharers.get(pages_of(region).payers.get(chunk, 0))
    if payer is not None and window_of(payer).far is None:
        return payer
    writers = (each for each in region.sharers.values() if each.writable)
    return next((each for each in writers if window_of(each).far is None), None)
