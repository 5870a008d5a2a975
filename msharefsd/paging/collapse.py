"""Huge pages for memory that many share: it takes back their page tables.

What that is, and what it costs, says `msharetables.collapse`, which does it; here is which
chunks of a region it is done to, and in whose name: that of the sharer that populated the
chunk, so that the huge page is charged where the small ones were.
A process that has no huge pages (PR_SET_THP_DISABLE), or that we may not do that to, is
no reason for the others to do without: then it is asked for in another's name.
But for the address space of another user's process nobody waits here (lanes.py): it is in
the name of a sharer of the owner's, or not at all.

Left out are chunks that have a hole or an absent page (the kernel would have to fill
it behind the page server's back, and refuses), and those where something is
write-protected (protection is kept page by page).  A chunk costs milliseconds, and the
more the more sharers have touched it: so it is looked for often, while a region is being
filled, and done in a thread, with pauses: this never takes more than a part of a processor.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
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
CAP_SYS_NICE: Final = 23
MOST_SAID: Final = 1024
MOST_NAMES: Final = 8
"""In how many sharers' names one chunk is tried in one look."""

# It has no huge pages, or what it has mapped has changed meanwhile; it is gone.
_NOT_THIS_ONE: Final = frozenset({Outcome.REFUSED, Outcome.GONE})


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
        self._said: set[int] = set()
        """Regions of which it has been told that some page tables stay."""

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

    async def _run(self, region: Region, payers: Sequence[Sharer], chunks: Sequence[int]) -> None:
        """Chunks that lie behind each other, and in whose names, in this order."""
        # One of many may be what is refused, and nobody knows which: then each by itself.
        for payer in payers if len(chunks) == 1 else payers[:1]:
            # Looked at again: what was true of them may have changed while they waited.
            chunks = [chunk for chunk in chunks if _may_be(region, chunk)]
            if not chunks or chunks[-1] - chunks[0] != (len(chunks) - 1) * HUGE_PAGE:
                return  # next time
            if payer.pidfd is None:
                continue
            outcome = await self._in_name_of(payer, payer.pidfd, chunks)
            if len(chunks) == 1:
                window_of(payer).huge = outcome is not Outcome.REFUSED
            if outcome not in _NOT_THIS_ONE:
                break
        else:
            outcome = Outcome.REFUSED
        if outcome is Outcome.DONE:
            self._metrics.collapsed.inc(len(chunks))
        elif len(chunks) == 1:
            self._metrics.not_collapsed.labels(outcome.value).inc()
            if outcome is Outcome.REFUSED:
                self._say(region)
        else:
            for chunk in chunks:
                await self._run(region, payers, [chunk])

    async def _in_name_of(self, payer: Sharer, pidfd: int, chunks: Sequence[int]) -> Outcome:
        """Raises PermissionError: without the right to do it to anybody."""
        region, pages = payer.region, pages_of(payer.region)
        pidfd = os.dup(pidfd)
        address, length = region.start + chunks[0], len(chunks) * HUGE_PAGE
        pages.collapsed.update(chunks)  # before: what changes them meanwhile takes them out again
        barrier("collapse")
        outcome, taken = Outcome.BUSY, 0.0
        try:
            outcome, taken = await self._in_thread(partial(collapse, pidfd, address, length))
        except PermissionError:
            if not syscalls.capabilities() >> CAP_SYS_NICE & 1:
                raise
            outcome = Outcome.REFUSED
        except OSError as error:
            log.warning("region %s: cannot collapse: %s", region.label(), error.strerror)
        finally:
            os.close(pidfd)
            if outcome is not Outcome.DONE:
                pages.collapsed.difference_update(chunks)
        await trio.sleep(self._pace.pause(taken))
        return outcome

    def _say(self, region: Region) -> None:
        if region.id in self._said:
            return
        if len(self._said) >= MOST_SAID:
            self._said.clear()
        self._said.add(region.id)
        log.info(
            "region %s: page tables stay as they are: none of its sharers that were tried may "
            "have huge pages (PR_SET_THP_DISABLE), or be asked in the name of; or what they have "
            "mapped has changed meanwhile",
            region.label(),
        )

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


def _runs(region: Region, chunks: Iterable[int]) -> Iterator[tuple[list[Sharer], list[int]]]:
    """Who pays for which chunks, a few at a time that lie behind each other."""
    most = max(
        int(AT_ONCE_SECONDS / max(SECONDS_A_CHUNK, SECONDS_A_SHARER * len(region.sharers))), 1
    )
    run: list[int] = []
    payers: list[Sharer] = []
    for chunk in chunks:
        if not _may_be(region, chunk):
            continue
        pay = _in_whose_names(region, chunk)
        if run and (pay != payers or chunk != run[-1] + HUGE_PAGE or len(run) >= most):
            if payers:
                yield payers, run
            run = []
        payers = pay
        run.append(chunk)
    if run and payers:
        yield payers, run


def _in_whose_names(region: Region, chunk: int) -> list[Sharer]:
    """Who is to pay for a chunk: who populated it; else who writes, the oldest first.

    Those of whom it is known that they have no huge pages come last: that may have changed.
    """
    payer = region.sharers.get(pages_of(region).payers.get(chunk, 0))
    writers = (each for each in region.sharers.values() if each.writable and each is not payer)
    first = [] if payer is None else [payer]
    named = (each for each in itertools.chain(first, writers) if _may_be_asked(each))
    found = itertools.islice(named, MOST_NAMES)
    return sorted(found, key=lambda each: not window_of(each).huge)


def _may_be_asked(sharer: Sharer) -> bool:
    return sharer.pidfd is not None and window_of(sharer).far is None
