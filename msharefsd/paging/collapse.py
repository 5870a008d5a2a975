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
write-protected (protection is kept page by page).  A chunk costs a millisecond, and ten
times that where a hundred sharers have touched it.  So it is done as soon as a chunk has been
populated, the newest first (fresh.py), and in a large region already for its first sharer;
what is left then is looked for every few seconds.  It is done in a thread, with pauses: this
never takes more than a part of a processor.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
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
from msharefsd.paging.fresh import Fresh
from msharefsd.paging.pages import pages_of
from msharefsd.paging.window import window_of
from msharefsd.region.region import Region, Sharer
from msharefsd.telemetry.metrics import Metrics
from msharefsd.telemetry.seldom import Seldom
from msharetables import fill
from msharetables.collapse import Answer, Batch, Outcome, ask
from msharetables.pace import Pace

log = logging.getLogger(__name__)

T = TypeVar("T")

FEWEST_SHARERS: Final = 2
FILLING_SECONDS: Final = 10.0
"""So long a region is left alone while its contents come: who waits for these comes first."""
LARGE: Final = 64 << 20
"""A region of so many bytes does not wait for a second sharer."""
SHARE_OF_A_PROCESSOR: Final = 0.5
AT_ONCE_SECONDS: Final = 0.05
"""How long (processor time) one call may take: each waits first for all processors, which takes
as long on a busy machine."""
BATCH: Final = 64
"""Chunks found at once."""
CAP_SYS_NICE: Final = 23
MOST_SAID: Final = 1024
MOST_NAMES: Final = 8
"""In how many sharers' names one chunk is tried in one look."""

_ALL: Final = int.from_bytes(b"\1" * (HUGE_PAGE // syscalls.PAGE), "big")

_NOT_NOW: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
# It has no huge pages, or what it has mapped has changed meanwhile; it is gone.
_NOT_THIS_ONE: Final = frozenset({Outcome.REFUSED, Outcome.GONE})


class Collapser:
    """Collapses what has been populated just now, and every few seconds what is left."""

    def __init__(self, metrics: Metrics, fresh: Fresh, interval: float) -> None:
        """`interval`: seconds between two looks."""
        self._metrics = metrics
        self._fresh = fresh
        self._interval = interval
        self._limiter = trio.CapacityLimiter(1)
        self._seldom = Seldom()
        self._pace = Pace(SHARE_OF_A_PROCESSOR)
        self._seen: dict[int, tuple[int, ...]] = {}
        """By region id: how it was when there was nothing left to be done."""
        self._batches: dict[int, Batch] = {}
        """By region id."""
        self._said: set[int] = set()
        """Regions of which it has been told that some page tables stay."""

    async def run(self, regions: Callable[[], Iterable[Region]]) -> None:
        """Collapse, pause; forever, or until it turns out to be not allowed."""
        self._fresh.wanted = True
        look = trio.current_time() + self._interval
        try:
            while True:
                with trio.move_on_at(look):
                    await self._fresh.ripe()
                try:
                    await self._newest()
                    if trio.current_time() >= look:
                        await self._look(list(regions()))
                        look = trio.current_time() + self._interval
                except OSError as error:
                    if error.errno not in _NOT_NOW:
                        raise
                    # Sharers have taken all descriptors: theirs come first.
                    await trio.sleep_until(max(look, trio.current_time() + self._interval))
        except PermissionError:
            log.warning(
                "no right to process_madvise(2) on sharers (CAP_SYS_NICE): their page "
                "tables stay as they are"
            )
        finally:
            self._fresh.wanted = False

    async def _newest(self) -> None:
        while taken := self._fresh.take(BATCH):
            for region, chunks in taken.items():
                if _worth_it(region):
                    await self._chunks(region, chunks)

    async def _chunks(self, region: Region, chunks: Sequence[int]) -> None:
        """Those that are there as a whole."""
        chunks = [chunk for chunk in chunks if _may_be(region, chunk)]
        if not chunks or region.backing is None:
            return
        fd = os.dup(region.backing.fd)
        try:
            whole = await self._in_thread(partial(_whole, fd, chunks))
        finally:
            os.close(fd)
        for run in self._runs(region, whole):
            await self._run(region, *run)

    async def _look(self, regions: Sequence[Region]) -> None:
        numbers = {region.id for region in regions}
        self._seen = {each: how for each, how in self._seen.items() if each in numbers}
        self._batches = {each: batch for each, batch in self._batches.items() if each in numbers}
        for region in regions:
            if _worth_it(region):
                await self._region(region)

    async def _region(self, region: Region) -> None:
        assert region.backing is not None
        how = _how(region)  # before: what changes while we look is to be seen the next time
        if self._seen.get(region.id) == how:
            return
        plain = [(item.offset, item.end) for item in region.objects if not item.guarded]
        fd = os.dup(region.backing.fd)  # the region may go while the thread looks
        idle = True
        try:
            found = fill.whole_chunks(fd, plain)
            while chunks := await self._in_thread(partial(_some, found)):
                for run in self._runs(region, chunks):
                    idle = False
                    await self._run(region, *run)
                    await self._newest()  # it is cheap as long as it is that
        finally:
            os.close(fd)
        if idle:
            self._seen[region.id] = how

    def _runs(
        self, region: Region, chunks: Iterable[int]
    ) -> Iterator[tuple[list[Sharer], list[int]]]:
        """Who pays for which chunks, a few at a time that lie behind each other."""
        batch = self._batches.setdefault(region.id, Batch(AT_ONCE_SECONDS))
        run: list[int] = []
        payers: list[Sharer] = []
        for chunk in chunks:
            if not _may_be(region, chunk):
                continue
            pay = _in_whose_names(region, chunk)
            if run and (pay != payers or chunk != run[-1] + HUGE_PAGE or len(run) >= batch.most):
                if payers:
                    yield payers, run
                run = []
            payers = pay
            run.append(chunk)
        if run and payers:
            yield payers, run

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
        answer: Answer | None = None
        began = trio.current_time()
        try:
            answer = await self._in_thread(partial(ask, pidfd, address, length))
        finally:
            os.close(pidfd)
            if answer is None or answer.code:
                pages.collapsed.difference_update(chunks)
        said = errno.errorcode.get(answer.code, "done")
        pages.collapse_calls[said] += 1
        self._metrics.collapse_calls.labels(said).inc()
        outcome = answer.outcome
        if outcome is Outcome.DONE and region.id in self._batches:
            self._batches[region.id].took(len(chunks), answer.processor)
        if answer.code in (errno.EPERM, errno.EACCES):
            if not syscalls.capabilities() >> CAP_SYS_NICE & 1:
                raise PermissionError(answer.code, os.strerror(answer.code))
            outcome = Outcome.REFUSED
        elif outcome is None:
            if self._seldom.now((region.id, answer.code)):
                why = os.strerror(answer.code)
                log.warning("region %s: cannot collapse: %s", region.label(), why)
            outcome = Outcome.BUSY
        waited = trio.current_time() - began - answer.processor
        await trio.sleep(self._pace.pause(answer.processor, waited, worth_it=True))
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


def _whole(fd: int, chunks: Iterable[int]) -> list[int]:
    """Those that are there as a whole.

    By mincore(2): lseek(2) looks at each page from there to the next hole.
    """
    present = (ctypes.c_ubyte * (HUGE_PAGE // syscalls.PAGE))()
    found = []
    for chunk in chunks:
        with contextlib.suppress(OSError):  # it was truncated
            address = syscalls.mmap(
                None, HUGE_PAGE, syscalls.PROT_READ, syscalls.MAP_SHARED, fd, chunk
            )
            try:
                syscalls.mincore(address, HUGE_PAGE, present)
            finally:
                syscalls.munmap(address, HUGE_PAGE)
            if int.from_bytes(present, "big") & _ALL == _ALL:  # at once: this has the GIL
                found.append(chunk)
    return found


def _worth_it(region: Region) -> bool:
    """Whether it is of small pages, and who shares it, or will share it."""
    if region.objects.awaited() and pages_of(region).awaiting.is_younger(FILLING_SECONDS):
        return False
    fewest = 1 if region.size >= LARGE else FEWEST_SHARERS
    return isinstance(region.backing, ShmBacking) and len(region.sharers) >= fewest


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
