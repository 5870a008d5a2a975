"""Reading files for pages, and ahead of who reads on.

A page of a file is read in a thread and comes by UFFDIO_COPY, so that nobody ever
sees it before it is filled.  Read through the host mapping's descriptor or by
pointer it would be there empty first.  A reader's is copied into the host mapping.
Who reads a file from one end to the other has it read ahead of it, as a page cache
does, in pieces: one is read while another one is copied.

Objects may change while a file is read.  So nothing awaits between the look at the
map, after the read, and the ioctl: what was read is put only where the same bytes of
the same file still belong.  Each who waits is then told what it came to, and that is
where this ends: what becomes of them is the page server's (`settled`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import Enum, auto
from functools import partial
from typing import Final

from msharefsd.barriers import barrier
from msharefsd.linux.uffd import Outcome
from msharefsd.memory.backing import Backing
from msharefsd.paging.background import Background
from msharefsd.paging.pages import Fill, Pages, Waiting, pages_of
from msharefsd.paging.populate import NOT_ALL, Populate, Source, pieces
from msharefsd.paging.window import Window
from msharefsd.region.objects import Object
from msharefsd.region.ranges import Ranges
from msharefsd.region.region import Region
from msharefsd.telemetry.seldom import Seldom
from msharefsd.threads.pool import Threads

log = logging.getLogger(__name__)

READ_AHEAD: Final = 16 << 20
"""How much of a file is read for one fault at the most (bytes)."""
PIECES: Final = 2
"""How many pieces of that at one time: a file that hangs must not take all threads."""


class Read(Enum):
    """What a read came to for one who waits."""

    HERE = auto()
    """All that it waits for has come into this very window."""
    IN_OTHERS = auto()
    """Some of that is there and did not come into this window, or nothing has come."""
    BEYOND = auto()
    """The file does not have such a page, or does not give it."""
    NO_MEMORY = auto()
    STALE = auto()
    """Memory starts fresh meanwhile: it is to be read anew."""
    STRANGE = auto()
    """The window takes no page; it is asked again all the same, after this."""


Settled = Callable[[Waiting, Read], None]
Failed = Callable[[Waiting, OSError], None]


class Fills:
    """Reads what belongs into pages from files, and puts it there."""

    def __init__(
        self,
        threads: Threads,
        populate: Populate,
        background: Background,
        settled: Settled,
        failed: Failed,
    ) -> None:
        """`settled`, `failed`: told what it came to for each who waits."""
        self._threads = threads
        self._populate = populate
        self._background = background
        self._settled = settled
        self._failed = failed
        self._seldom = Seldom()

    def join(self, found: Object, waiting: Waiting) -> bool:
        """Wait for who reads or brings the page; False if nobody does, or it is in the stash."""
        region = waiting.window.region
        if found.awaited:
            return True  # what is poisoned there is repaired when it is brought
        fill = pages_of(region).filling(found.file, waiting.offset)
        if fill is None or region.backing is None or region.backing.is_stashed(waiting.offset):
            return False
        fill.waiting.append(waiting)
        return True

    def read(self, found: Object, start: int, end: int, waiting: Waiting) -> None:
        """Have [start, end) read, the piece first that has the page somebody waits for."""
        if self.join(found, waiting):
            return
        pages = pages_of(waiting.window.region)
        parts = pieces(pages.piece, waiting.offset, start, end)
        fill = self._begin(pages, waiting.window, found, *next(parts), parts)
        fill.waiting.append(waiting)
        for _ in range(1, PIECES):
            self._ahead(pages, fill)

    def _begin(
        self,
        pages: Pages,
        window: Window,
        found: Object,
        start: int,
        end: int,
        rest: Iterator[tuple[int, int]],
    ) -> Fill:
        assert found.file is not None
        file_offset = found.file_offset + start - found.offset
        fill = Fill(found.file, start, end, file_offset, window, rest)
        pages.begin(fill)
        found.file.hold()
        self._background.start(self._run, pages, fill)
        return fill

    def _ahead(self, pages: Pages, before: Fill) -> None:
        """Have the next piece read of what `before` is a piece of, if it is still wanted."""
        region = pages.region
        for start, end in before.rest:
            found = region.objects.find(start)
            if (
                region.backing is None
                or not before.window.attached
                or found is None
                or found.file is not before.file
                or not found.accessible
                or pages.leaving.contains(start)
                or self._populate.room(region, end - start) < end - start
            ):
                return
            if region.backing.next_absent(start) < end and not pages.filling(found.file, start):
                self._begin(pages, before.window, found, start, min(end, found.end), before.rest)
                return

    async def _run(self, pages: Pages, fill: Fill) -> None:
        region, buffers = pages.region, self._populate.buffers
        buffer = buffers.take(fill.end - fill.start)
        view = buffer.view[: fill.end - fill.start]
        failed = False
        try:
            usable = await self._threads.run(
                fill.file.uid, partial(fill.file.read, view, fill.file_offset, region.page)
            )
        except OSError as error:
            usable, failed = 0, True
            if self._seldom.now((region.id, error.errno)):
                log.error(
                    "region %s: cannot read %s: %s",
                    region.label(),
                    fill.file.label(),
                    error.strerror,
                )
        finally:
            fill.file.let_go()
            pages.done(fill)
        barrier("fill.read")
        # Nothing awaits from here on: what is true now stays true.
        waiting = [each for each in fill.waiting if each.window.attached]
        try:
            if failed and fill.end - fill.start > region.page:
                self._in_halves(region, fill, waiting)
            elif region.backing is not None:
                self._finish(pages, fill, waiting, buffer.address, usable)
        except OSError as error:
            for each in waiting:
                self._failed(each, error)
        else:
            if usable == fill.end - fill.start:
                self._ahead(pages, fill)
        finally:
            buffers.give_back(buffer)
            fill.finished.set()

    async def finished(self, pages: Pages, start: int, end: int) -> None:
        """Wait for what is being read of [start, end) just now, and again in smaller pieces."""
        while fill := next(pages.fills(start, end), None):
            await fill.finished.wait()

    def _in_halves(self, region: Region, fill: Fill, waiting: list[Waiting]) -> None:
        """Some page of it cannot be read: who waits for another one has that all the same."""
        length = fill.end - fill.start
        middle = fill.start + max(region.page, length // 2 - length // 2 % region.page)
        for each in waiting:
            last = max(each.end, each.offset + region.page)
            for start, end in ((fill.start, middle), (middle, fill.end)):
                low, high = max(start, each.offset), min(end, last)
                if low < high:
                    self._read_half(fill, start, end, replace(each, offset=low, end=high))

    def _read_half(self, fill: Fill, start: int, end: int, waiting: Waiting) -> None:
        found = waiting.window.region.objects.find(waiting.offset)
        if found is None or found.file is not fill.file or not found.accessible:
            self._settled(waiting, Read.STALE)
        else:
            self.read(found, max(start, found.offset), min(end, found.end), waiting)

    def _finish(
        self, pages: Pages, fill: Fill, waiting: list[Waiting], address: int, usable: int
    ) -> None:
        if fill.stale:
            for each in waiting:
                self._settled(each, Read.STALE)
            return
        region = pages.region
        backing = region.backing
        assert backing is not None
        windows = [each.window for each in waiting]
        windows += [fill.window] if fill.window.attached else []
        target = next((each for each in windows if each.writable), windows[0] if windows else None)
        pages.clean(fill.start, fill.end)
        came, outcome = self._put_all(fill, target, waiting, address, usable)
        for each in waiting:
            found = region.objects.find(each.offset)
            if found is not None and found.file is fill.file and each.offset >= fill.start + usable:
                read = Read.BEYOND
            elif outcome is Outcome.NO_MEMORY and backing.next_data(each.offset) != each.offset:
                read = Read.NO_MEMORY
            elif each.window is target and came.covers(
                each.offset, max(each.end, each.offset + region.page)
            ):
                read = Read.HERE
            else:
                read = Read.IN_OTHERS
            self._settled(each, read)

    def _put_all(
        self, fill: Fill, target: Window | None, waiting: list[Waiting], address: int, usable: int
    ) -> tuple[Ranges, Outcome]:
        """Put what was read where it belongs still: what of it has come into `target`."""
        came, outcome = Ranges(), Outcome.DONE
        if target is None:
            return came, outcome
        backing, objects = target.region.backing, target.region.objects
        assert backing is not None
        for item in objects.within(fill.start, usable):
            same_place = item.file_offset - item.offset == fill.file_offset - fill.start
            if item.file is not fill.file or not same_place or not item.accessible:
                continue
            for start, end in _not_stashed(backing, item.offset, item.end):
                outcome = self._put(target, item, start, end, address + start - fill.start, waiting)
                if outcome is Outcome.DONE:
                    came.add(start, end)
        return came, outcome

    def _put(
        self,
        target: Window,
        item: Object,
        start: int,
        end: int,
        address: int,
        waiting: list[Waiting],
    ) -> Outcome:
        outcome = self._populate.put(
            target, start, end, address, guarded=item.guarded, source=Source.FILE
        )
        if outcome in NOT_ALL or outcome is Outcome.GONE:
            # As in Populate.around: at least the pages that somebody waits for.
            for each in waiting:
                low = max(start, each.offset)
                high = min(end, max(each.end, each.offset + target.region.page))
                if low < high:
                    put = partial(self._put_parts, each.window, guarded=item.guarded)
                    some = put(low, high, address + low - start)
                    outcome = some if some is Outcome.NO_MEMORY else outcome
                    if some is Outcome.STRANGE:
                        self._settled(each, Read.STRANGE)
        return outcome

    def _put_parts(
        self, window: Window, start: int, end: int, address: int, *, guarded: bool
    ) -> Outcome:
        """As much as can be had: there is not memory for all, or it lies in several VMAs."""
        outcome = self._populate.put(
            window, start, end, address, guarded=guarded, source=Source.FILE
        )
        page = window.region.page
        if outcome not in NOT_ALL or end - start <= page:
            return outcome
        half = (end - start) // 2
        middle = start + max(page, half - half % page)
        first = self._put_parts(window, start, middle, address, guarded=guarded)
        if first is Outcome.NO_MEMORY:
            return first
        rest = self._put_parts(window, middle, end, address + middle - start, guarded=guarded)
        return first if first in NOT_ALL else rest


def _not_stashed(backing: Backing, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of [start, end) that are not in the stash."""
    if backing.stash is None:
        yield start, end
        return
    for first, last in backing.stash.data(start, end - start):
        if start < first:
            yield start, first
        start = last
    if start < end:
        yield start, end
