"""Populating pages: how much, from where, and into whom.

How a page is populated decides who pays for it (memory cgroups charge by the mm
that a page was populated through).  UFFDIO_ZEROPAGE into the faulting sharer
charges the sharer, as plain shared memory does, and maps the whole chunk there,
which saves a fault for each of its pages.  Through the host mapping the daemon
would pay: a container's limit would mean nothing, and the daemon would be the OOM
killer's first choice.  A reader's window is private, and zeros put there would be
its own: readers are served through the host mapping.

Nothing here awaits: what its caller has found out of the region is true to the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from enum import Enum, auto
from typing import Final, NamedTuple

from msharefsd.barriers import barrier
from msharefsd.errors import Refused
from msharefsd.linux import uffd
from msharefsd.linux.syscalls import HUGE_PAGE
from msharefsd.linux.uffd import Outcome
from msharefsd.memory.backing import Backing
from msharefsd.memory.buffers import BUFFER, Buffers, Zeros
from msharefsd.paging import protection
from msharefsd.paging.fresh import Fresh
from msharefsd.paging.pages import Pages, pages_of
from msharefsd.paging.watch import Watch
from msharefsd.paging.window import Mapping, Window
from msharefsd.region.objects import Object
from msharefsd.region.region import Region
from msharefsd.telemetry.metrics import Metrics

NOT_ALL: Final = frozenset({Outcome.NO_MEMORY, Outcome.RETRY, Outcome.STRANGE})
"""A chunk that could not be populated: perhaps the one page can."""


TRIES: Final = 16
"""How often a page that a reader has made is taken out before one that is to be put."""


class Source(Enum):
    """Where the contents of pages come from."""

    ZEROS = auto()
    """Memory that nobody has written, or what is there for a moment only."""
    STASH = auto()
    FILE = auto()


class Part(NamedTuple):
    """What of a chunk is populated at one time: all of it comes from one place."""

    start: int
    end: int
    stashed: bool
    """From the stash."""


class Populate:
    """Populates pages of regions, within their limits."""

    def __init__(self, metrics: Metrics, fresh: Fresh, region_memory: int | None) -> None:
        """`region_memory`: the most bytes a region may hold, or None."""
        self._metrics = metrics
        self._fresh = fresh
        self._region_memory = region_memory
        self.buffers = Buffers()
        self._zeros = Zeros()

    # -- how much --

    def room(self, region: Region, wanted: int) -> int:
        """How much of `wanted` bytes of memory the region may have more, by its limits.

        What is being read from files counts as if it were there.
        """
        reading = pages_of(region).reading
        room = wanted + reading
        if self._region_memory is not None:
            room = min(room, self._region_memory - region.allocated())
        return max(0, region.account.room(max(0, room)) - reading)

    def check_memory(self, region: Region) -> None:
        """Raise Refused(EDQUOT) if a region has more than its limits, by a donor's writing."""
        if self._region_memory is not None and region.allocated() > self._region_memory:
            raise Refused(errno.EDQUOT, "more memory than region_memory of msharefsd allows")
        region.account.check_memory()

    def part(
        self, region: Region, found: Object, chunk: tuple[int, int], offset: int
    ) -> Part | None:
        """What to populate for the page at `offset`, of its chunk (start, length).

        As far as the object and the limits go; None if there is no room for one page.
        """
        backing = region.backing
        assert backing is not None
        start, end = max(chunk[0], found.offset), min(chunk[0] + chunk[1], found.end)
        start, end, stashed = _of_one_source(backing, start, end, offset)
        if not stashed:  # what comes back from the stash is no more than there was
            left = self.room(region, end - start)
            if left < end - start:
                start, end = offset, min(end, offset + left - left % region.page)
        return Part(start, end, stashed) if start < end else None

    # -- from where --

    def around(self, window: Window, found: Object, part: Part, offset: int) -> Outcome:
        """Populate a part, or at least the page at `offset`, which somebody waits for."""
        page = window.region.page
        outcome = self.fill(window, found, part)
        if outcome in NOT_ALL and (part.start, part.end) != (offset, offset + page):
            # Not enough memory for the chunk, or it lies in several VMAs.
            outcome = self.fill(window, found, Part(offset, offset + page, part.stashed))
        return outcome

    def fill(self, window: Window, found: Object, part: Part) -> Outcome:
        """Populate what is absent, with zeros or from the stash."""
        start, end = part.start, part.end
        if not part.stashed:
            return self.put(window, start, end, None, guarded=found.guarded)
        backing, watch = window.region.backing, pages_of(window.region).watch
        assert backing is not None
        assert backing.stash is not None
        stash = backing.stash
        buffer = self.buffers.take(end - start)
        try:
            got = os.preadv(stash.fd, [buffer.view[: end - start]], start)
            end = start + got - got % backing.page
            outcome = self.put(
                window, start, end, buffer.address, guarded=found.guarded, source=Source.STASH
            )
            barrier("stash.copied")
            if outcome in (Outcome.DONE, Outcome.PRESENT):
                if watch is not None and found.file is not None:
                    watch.add(start, end)
                    barrier("stash.put")
                stash.punch(start, end - start)
                if watch is not None:
                    _let_write(window, start, end, guarded=found.guarded)
        except Refused as error:  # it stays in the stash
            return uffd.outcome_of(error)
        finally:
            self.buffers.give_back(buffer)
        return outcome

    # -- into whom --

    def put(
        self,
        window: Window,
        start: int,
        end: int,
        address: int | None,
        *,
        guarded: bool,
        source: Source = Source.ZEROS,
    ) -> Outcome:
        """Populate what is absent in [start, end) from `address`, or with zeros.

        Into the sharer if it pays; for a reader, and where nobody pays, into the host
        mapping.  DONE when nothing is absent and whoever waited there has been woken;
        PRESENT when not all of it has come into this very window, which is a writer's.

        In a region that is watched nobody can write to what comes from a file before that
        is written down, nor to what comes from the stash before _let_write().
        """
        region = window.region
        pages = pages_of(region)
        backing = region.backing
        assert backing is not None
        pays = window.writable and backing.charges_sharer
        watch = pages.watch if source is not Source.ZEROS else None
        try:
            if guarded:  # before anybody can see the pages
                protection.protect(pages, start, end)
                if pages.behind:
                    return Outcome.RETRY  # and is held then (PageServer)
            target = window if pays else Mapping(backing.host, backing.host.start)
            # UFFDIO_ZEROPAGE protects nothing, and hugetlb does not have it.
            copied = (guarded and not target.copies_zeros) or not backing.charges_sharer
            if address is None and copied:
                address = self._zeros.address(end - start)
        except OSError as error:
            return uffd.outcome_of(error)
        if pays:
            _pays(pages, window, start, end)
            self._fresh.add(region, start, end)
        if watch is not None:
            watch.clean(start, end)
        protect = pays and (guarded or watch is not None)
        outcome = self._absent(backing, target, start, end, address, protect=protect, watch=watch)
        late = outcome is Outcome.LATE
        if late:
            outcome = self._in_its_place(window, backing, start, end, address, watch)
        if watch is not None:
            outcome = _written_down(watch, window, start, end, outcome, source, guarded=guarded)
        if (late or not pays) and outcome in (Outcome.DONE, Outcome.PRESENT):
            window.wake(start, end)
            return Outcome.PRESENT if late else Outcome.DONE
        return outcome

    def _in_its_place(
        self,
        window: Window,
        backing: Backing,
        start: int,
        end: int,
        address: int | None,
        watch: Watch | None,
    ) -> Outcome:
        """Populate as for a reader: nobody waits for the lock of that address space.

        What may be under way there copies nothing that is not put here, now.
        """
        if address is not None and window.far is not None and window.far.under_way:
            self.buffers.copied_late(address, window.far.keep)
        host = Mapping(backing.host, backing.host.start)
        return self._absent(backing, host, start, end, address, protect=False, watch=watch)

    def _absent(
        self,
        backing: Backing,
        target: Mapping,
        start: int,
        end: int,
        address: int | None,
        *,
        protect: bool,
        watch: Watch | None,
    ) -> Outcome:
        """Populate what is absent in [start, end) in one address space.

        The kernel wakes who waits in a part that was populated, not who waits for a
        page that turned out to be present: PRESENT if there was one.
        """
        result = Outcome.DONE
        at, tries = start, TRIES
        while at < end:
            if address is None:
                done, outcome = target.zeropage(at, end, protect=protect)
            else:
                done, outcome = target.copy(at, end, address + at - start, protect=protect)
            self._metrics.populated.inc(done)
            backing.growth(done)
            at += done
            if outcome is Outcome.PRESENT:
                # The backing may call a page absent that this sharer has something
                # for all the same (it mapped the window in a way of its own).
                if not backing.believes_present(at):
                    return Outcome.NO_MEMORY
                result = outcome
                if watch is not None and address is not None:
                    put = watch.put.find(at)
                    if put is not None:
                        at = put[1]
                    elif tries:
                        tries -= 1
                        watch.met(at)
                    elif _replaced(backing, at, address + at - start):
                        at += backing.page
                    else:
                        return Outcome.NO_MEMORY
                    continue
                at = max(backing.next_absent(at), at + backing.page)
            elif outcome is not Outcome.DONE and done == 0:
                return outcome
        return result


def _pays(pages: Pages, window: Window, start: int, end: int) -> None:
    for chunk in range(start - start % HUGE_PAGE, end, HUGE_PAGE):
        pages.payers[chunk] = window.sharer.number


def _written_down(
    watch: Watch,
    window: Window,
    start: int,
    end: int,
    outcome: Outcome,
    source: Source,
    *,
    guarded: bool,
) -> Outcome:
    """What has been put is put: what it comes to then."""
    barrier("watch.copied")
    if outcome not in (Outcome.DONE, Outcome.PRESENT):
        watch.clean(start, end, ours=True)
    elif source is Source.FILE:
        try:
            watch.add(start, end)
        except Refused as error:
            watch.clean(start, end, ours=True)
            return uffd.outcome_of(error)
        barrier("watch.put")
        _let_write(window, start, end, guarded=guarded)
    return outcome


def _let_write(window: Window, start: int, end: int, *, guarded: bool) -> None:
    """What has been put protected may be written, if its object says so."""
    if window.writable and not guarded:
        with contextlib.suppress(OSError):  # then it is found out at the first write
            window.unprotect(start, end)


def _replaced(backing: Backing, page: int, address: int) -> bool:
    """Write over a page that a reader makes again and again; nobody else has it mapped."""
    try:
        return backing.overwrite(page, ctypes.string_at(address, backing.page))
    except OSError:
        return False


def _of_one_source(backing: Backing, start: int, end: int, offset: int) -> tuple[int, int, bool]:
    """The part of [start, end) around `offset` that comes from where that page comes from.

    And whether that is the stash.  What passes through a buffer fits in it.
    """
    if backing.stash is None:
        return start, end, False
    stashed = backing.is_stashed(offset)
    if stashed:
        start, end = next(pieces(max(BUFFER, backing.page), offset, start, end))
        end = min(end, backing.stash.next_absent(offset))
        other = backing.stash.next_absent(start)
    else:
        end = min(end, backing.stash.next_data(offset))
        other = backing.stash.next_data(start)
    if other < offset:
        start = offset
    return start, end, stashed


def pieces(length: int, offset: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """[start, end) from the piece on that `offset` is in; pieces are aligned to `length`."""
    for piece in range(offset - offset % length, end, length):
        yield max(piece, start), min(piece + length, end)
