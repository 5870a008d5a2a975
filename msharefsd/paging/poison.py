"""Poison: pages that raise SIGBUS in one sharer, without asking us again.

UFFDIO_POISON leaves a marker in the sharer's page table.  What holds of markers:

- Where we put one is known (`Window.poisoned`) and written down, before it is there
  and until after it is gone: nobody else would ever find it.
- What is known are ranges, so many for all sharers of a user together, in memory and in
  the journal.  Who has more has markers that nobody knows, and they stay.
- The kernel takes a marker away for one thing only: a page that comes there.  A page
  that is in the backing already comes by UFFDIO_CONTINUE, which takes MINOR mode.
- A hole's is right as long as it is a hole.  Where something is mapped it has to go
  before the call returns that maps it: from all writers, and from readers as far as
  they are few.  A reader with more than that has them taken away by and by (hunger.py):
  it is not to make its region's owner wait.
- In a writer of another user that goes in turn, when its lane does not do it in a moment,
  and is waited for so long (lanes.py, Waits).  Hence it is done with the page that stays
  there: what is there for a moment only would be seen meanwhile.  A reader's goes by and by.
- In a hole nothing is ever put to clear one: others could see it.  Nor zeros where a file
  is mapped: what takes the marker's place there is the page, as it was read or brought.
- Between the look at the map and the ioctl nothing awaits.  So a repair needs no lock.

All of it goes by ranges, of which a piece is done at one time.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

from msharefsd.barriers import barrier
from msharefsd.errors import Refused
from msharefsd.journal.journal import Journal
from msharefsd.linux.features import Capabilities
from msharefsd.linux.uffd import Mode, Outcome
from msharefsd.memory.backing import Backing
from msharefsd.paging import protection
from msharefsd.paging.fills import Fills
from msharefsd.paging.hunger import Hunger
from msharefsd.paging.lanes import Waits
from msharefsd.paging.marks import Marks
from msharefsd.paging.pages import Pages, Waiting, pages_of
from msharefsd.paging.populate import Part, Populate
from msharefsd.paging.window import Mapping, Window
from msharefsd.region.objects import Object
from msharefsd.telemetry.seldom import Seldom
from msharefsd.threads.breath import Breath

log = logging.getLogger(__name__)

READERS_RANGES: Final = 64
"""How many of all readers' a call that maps something takes away itself."""
_LATER: Final = frozenset({Outcome.NO_MEMORY, Outcome.RETRY})
"""The marker is still there, and nobody faults where it is: we have to try again."""


class Poison:
    """Puts markers, and repairs pages that have one."""

    def __init__(
        self,
        capabilities: Capabilities,
        journal: Journal,
        populate: Populate,
        fills: Fills,
        hunger: Hunger,
    ) -> None:
        self._capabilities = capabilities
        self._journal = journal
        self._populate = populate
        self._fills = fills
        self._hunger = hunger
        self._seldom = Seldom()
        self.marks = Marks(journal)

    def known(self, window: Window, offset: int) -> Outcome:
        """Poison the page of a hole, or of what cannot be had, and remember that."""
        end = offset + window.region.page
        before = window.poisoned.contains(offset)
        remembered = before or self.marks.remember(window, offset, end)
        outcome = self.fleeting(window, offset)
        if outcome is Outcome.PRESENT and self._forget_protection(window, offset, end):
            outcome = self.fleeting(window, offset)
        if outcome is Outcome.DONE:
            window.markers += 1
            if not remembered and self._seldom.now((window.sharer.uid, "poisoned")):
                log.warning(
                    "process %d touches holes of region %s all over: some of them stay holes "
                    "for it whatever is mapped there",
                    window.sharer.pid,
                    window.region.label(),
                )
        elif remembered and not before and outcome is not Outcome.LATE:
            self.marks.strike(window, offset, end)
        return outcome

    def fleeting(self, window: Window, offset: int) -> Outcome:
        """Poison a page without remembering it: it is nothing of the region's."""
        end = offset + window.region.page
        outcome = window.poison(offset, end) if self._capabilities.poison else Outcome.RETRY
        # PRESENT: poisoned or populated meanwhile.
        window.wake(offset, end)
        return outcome

    def _forget_protection(self, window: Window, start: int, end: int) -> bool:
        """Take away a marker that write protection has left where no page is.

        A daemon that died between the two leaves one where it has freed a page, and
        poison does not replace it: the thread would try again for ever.  A page that
        comes is protected anew.
        """
        backing = window.region.backing
        if backing is None or backing.next_data(start) == start:
            return False
        with contextlib.suppress(OSError):  # not registered for it: no marker
            window.unprotect(start, end, wake=False)
        return True

    # -- repair --

    async def clear(
        self,
        pages: Pages,
        offset: int,
        length: int,
        *,
        empty: bool = False,
        readers: bool = True,
        waits: Waits | None = None,
    ) -> None:
        """Make sharers ask again for pages of objects in the range that raise SIGBUS.

        The kernel has no call for that; a page that comes into a sharer takes the
        marker's place.  Where nobody may touch anything one is put there and punched out
        again, and so where zeros belong, or nothing does beyond a file's end, in a range that
        is being mapped (`empty`); what a file has is left alone then.  Elsewhere it is the
        page itself, which may have to be read: Fills.finished().  In a hole SIGBUS is right,
        and others could see what is put there.

        `readers`: whether theirs, too.  `waits`: for how long it may wait for processes of
        other users.  What is not cleared then hunger.py goes on with, and with what is late
        where the range is being mapped.

        The region may be gone when this returns.
        """
        end = offset + length
        left = READERS_RANGES
        waits = waits or Waits()
        breath = Breath()
        for window in [each for each in pages.refused if readers or each.writable]:
            at = offset
            if window.writable and any(window.poisoned.within(offset, end)):
                with waits.on(window.sharer.uid):
                    await window.level()
            while window.attached and (part := next(window.poisoned.within(at, end), None)):
                if not window.writable:
                    left -= 1
                    if left < 0:
                        for low, high in list(window.poisoned.within(at, end)):
                            self._hunger.notice(window, low, high)
                            await breath.take()
                        break
                at = self._clear_first(window, *part, empty=empty)
                if not empty:
                    await self._in_turn(window, part[0], at, waits)
                await breath.take()

    def clear_page(self, window: Window, offset: int) -> None:
        """The same for one page of one sharer, at once."""
        pages, end = pages_of(window.region), offset + window.region.page
        if not window.poisoned.contains(offset):
            return
        if pages.leaving.contains(offset):
            self._hunger.notice(window, offset, end)
        else:
            self._clear_first(window, offset, end, empty=False)

    def _clear_first(self, window: Window, start: int, end: int, *, empty: bool) -> int:
        """Clear what is first in [start, end), all of it poisoned.  Returns up to where."""
        piece = pages_of(window.region).piece
        found = window.region.objects.first(start, end)
        if empty:
            end = min(end, start - start % piece + piece)
            contents = start if found is None else _contents(found, window.region.page)
            if start >= contents:
                return self._clear(window, start, end)
            end = min(end, contents)
            self._hunger.notice(window, start, end)  # should nobody read it before
            return end
        if found is None:
            return end
        start, end = found.offset, min(found.end, found.offset - found.offset % piece + piece)
        if not found.accessible:
            return self._clear_hidden(window, found, start, end)
        at = self.repair(window, found, start, end)
        return at if at > start else end

    def _clear(
        self,
        window: Window,
        start: int,
        end: int,
        content: int | None = None,
        *,
        guarded: bool = False,
    ) -> int:
        """Replace markers by pages with that content, or zeros, and free them again.

        `guarded`: nobody can write to them meanwhile; the range is armed.
        """
        backing = window.region.backing
        assert backing is not None
        outcome = self._populate.put(window, start, end, content, guarded=guarded)
        if outcome in _LATER and end > start + backing.page:
            # Not so much memory, or several VMAs.
            backing.punch(start, end - start)
            half = _half(start, end, backing.page)
            return self._clear(window, start, half, content, guarded=guarded)
        if outcome in _LATER:
            # Something may be mapped there in a moment: then the page is the region's.
            self._hunger.notice(window, start, end)
            return end
        mapped = self._map(window, start, end, by_others=outcome is Outcome.PRESENT)
        barrier("poison.cleared")
        backing.punch(start, end - start)  # at once: everybody sees what is there
        if mapped:
            self.marks.strike(window, start, end)
        else:
            self._hunger.notice(window, start, end)
        return end

    def _clear_hidden(self, window: Window, found: Object, start: int, end: int) -> int:
        """In an object that nobody may touch: what belongs there stays where it is.

        If we die before the page is freed, the next daemon takes it for the object's.  So
        it has what is in the stash, if anything is; and a page of a file that was not
        read yet is written down as one that is to go.
        """
        backing = window.region.backing
        assert backing is not None
        pages = pages_of(window.region)
        pages.clean(start, end)
        end, present, stashed = _alike(backing, start, end)
        if present:  # populated by another, and not hidden yet
            self.mapped(window, start, end, by_others=True)
            return end
        try:
            # A system call that comes in the moment in which the page is there must not write.
            protection.arm(pages, start, end)
        except Refused:
            self._hunger.notice(window, start, end)
            return end  # a touch is SIGBUS until then, and not SIGSEGV
        if stashed:
            assert backing.stash is not None
            buffer = self._populate.buffers.take(end - start)
            try:
                got = os.preadv(backing.stash.fd, [buffer.view[: end - start]], start)
                if got == end - start:
                    return self._clear(window, start, end, buffer.address, guarded=True)
                return end  # truncated by a sharer
            finally:
                self._populate.buffers.give_back(buffer)
        if found.file is not None:
            try:
                self._journal.add_clearing(window.region.id, start, end - start)
            except Refused:
                return end  # as above
        return self._clear(window, start, end, guarded=True)

    def repair(self, window: Window, found: Object, start: int, end: int) -> int:
        """Populate poisoned pages of an object in this sharer: a piece from `start` on.

        Returns up to where that is done, or under way; `start` for want of memory.
        """
        region = window.region
        backing = region.backing
        assert backing is not None
        piece = pages_of(region).piece
        stop = min(end, start - start % piece + piece)
        pages_of(region).clean(start, stop)
        stop, present, stashed = _alike(backing, start, stop)
        if present:
            self.mapped(window, start, stop, by_others=True)
            return stop
        if not stashed:
            room = self._populate.room(region, stop - start)
            stop = min(stop, start + room - room % backing.page)
            if stop == start:
                self._hunger.notice(window, start, end)
                return start
        if found.file is not None and not stashed:
            under_way = pages_of(region).filling(found.file, start)
            if under_way is not None:
                stop = min(stop, under_way.end)  # and no further
            window.starved.remove(start, stop)
            self._fills.read(found, start, stop, Waiting(window, start, None, stop))
            return stop
        outcome = self._populate.fill(window, found, Part(start, stop, stashed))
        while outcome in _LATER and stop > start + backing.page:
            stop = _half(start, stop, backing.page)
            outcome = self._populate.fill(window, found, Part(start, stop, stashed))
        if outcome in _LATER:
            self._hunger.notice(window, start, end)
            return start
        self.mapped(window, start, stop, by_others=outcome is Outcome.PRESENT)
        return stop

    def read(self, window: Window, start: int, end: int, *, by_others: bool) -> None:
        """What of [start, end) could be read from a file is there: where it was poisoned."""
        backing = window.region.backing
        assert backing is not None
        pages_of(window.region).clean(start, end)
        for low, high in list(window.poisoned.within(start, end)):
            # Poison is right where there has been a hole meanwhile.
            for first, last in list(backing.data(low, high - low)):
                self.mapped(window, first, min(last, high), by_others=by_others)

    def mapped(self, window: Window, start: int, end: int, *, by_others: bool) -> None:
        """Poisoned pages have been populated: see that the sharer has them now.

        What came into this very sharer has replaced the marker.  If it did not, only
        UFFDIO_CONTINUE replaces it, which takes MINOR mode.
        """
        if self._map(window, start, end, by_others=by_others):
            # Not before: nobody would know of the markers if we died in between.
            self.marks.strike(window, start, end)
        else:
            self._hunger.notice(window, start, end)

    def _map(self, window: Window, start: int, end: int, *, by_others: bool) -> bool:
        """A piece, which has one object or is about to; False if it is late."""
        region = window.region
        backing, pages = region.backing, pages_of(region)
        assert backing is not None
        if window.writable:
            slot = backing.shared_slot(start)
            if slot is not None and not any(True for _ in pages.armed.within(*slot)):
                return True  # what came into one page table came into all of them
            if not by_others and backing.charges_sharer:
                return True
        if not self._capabilities.map_present:
            return True
        page = region.page
        return all(_continue(window, page, part) for part in self._parts(window, start, end))

    @staticmethod
    def _parts(window: Window, start: int, end: int) -> list[_Part]:
        region, pages = window.region, pages_of(window.region)
        found = region.objects.find(start)
        guarded = found is not None and found.guarded
        # What nobody may touch is armed and protected when it is hidden.
        armed = list(pages.armed.within(start, end)) if window.writable else []
        plain = list(pages.armed.gaps(start, end)) if window.writable else [(start, end)]
        return [_Part(low, high, Mode.WP, guarded) for low, high in armed] + [
            _Part(low, high, Mode(0), protect=False) for low, high in plain
        ]

    async def _in_turn(self, window: Window, start: int, end: int, waits: Waits) -> None:
        """What is there of [start, end) comes into another user's process, in place of poison.

        It was late, and that is no reason for SIGBUS in what a call has mapped.
        """
        if window.far is None or not window.writable:
            return
        at = start
        while (
            window.attached
            and waits.left(window.sharer.uid)
            and (part := next(window.starved.within(at, end), None))
        ):
            at = part[1]
            region, backing = window.region, window.region.backing
            assert backing is not None
            pages_of(region).clean(*part)
            low, high = next(iter(backing.data(part[0], at - part[0])), (at, at))
            found = region.objects.find(low)
            if low < at and found is not None and found.accessible:
                at = min(high, at, found.end)
                await self._mapped_in_turn(window, low, at, waits)

    async def _mapped_in_turn(self, window: Window, start: int, end: int, waits: Waits) -> None:
        """As `mapped`.  What is asked of that lane later comes after it, protection too."""
        far, page = window.far, window.region.page
        assert far is not None
        call = partial(_continue_all, window.start, page, self._parts(window, start, end))
        markers, done = window.markers, False
        with contextlib.suppress(OSError), waits.on(window.sharer.uid):
            done = await far.in_turn(call)
        if done and window.attached and window.markers == markers:
            self.marks.strike(window, start, end)


class _Part(NamedTuple):
    """What of a piece is registered for the same, and so mapped at one time."""

    start: int
    end: int
    mode: Mode
    protect: bool


@dataclass(frozen=True, slots=True)
class _Descriptor:
    """A userfaultfd, by its number in the lane that uses it."""

    uffd: int


def _continue_all(at: int, page: int, parts: list[_Part], fd: int) -> bool:
    """As Poison._map, in a lane: in the window at `at`, and nothing may be absent."""
    window = Mapping(_Descriptor(fd), at)
    return all(_continue(window, page, part, strict=True) for part in parts)


def _continue(window: Mapping, page: int, part: _Part, *, strict: bool = False) -> bool:
    """Map what is in the backing, in place of markers; False if that is late.

    `strict`: or if something is not there, any more, and has its marker still.
    """
    start, end, mode, protect = part
    try:
        # Registering anew for MINOR takes away every mode that is not asked for again
        # (userfaultfd_register_range(), mm/userfaultfd.c).
        window.register(start, end, Mode.MISSING | Mode.MINOR | mode)
    except OSError as error:
        # The window is gone, or the process; or a part of the window.
        if window.is_gone():
            return True
        half = _half(start, end, page)
        if half < end:
            return _continue(window, page, part._replace(end=half), strict=strict) and _continue(
                window, page, part._replace(start=half), strict=strict
            )
        return error.errno != errno.ENOMEM  # no room for another VMA now
    return _map_all(window, page, start, end, protect=protect, strict=strict)


def _map_all(
    window: Mapping, page: int, start: int, end: int, *, protect: bool, strict: bool
) -> bool:
    while start < end:
        done, outcome = window.map_present(start, end, protect=protect)
        if outcome in (Outcome.GONE, Outcome.LATE):
            return outcome is Outcome.GONE
        if strict and outcome is Outcome.NO_MEMORY and not done:
            return False
        if outcome is Outcome.RETRY and not done:
            half = _half(start, end, page)
            if half == end or not _map_all(
                window, page, start, half, protect=protect, strict=strict
            ):
                return False  # the address space is changing
            start = half  # it lies in several VMAs
        else:
            start += done or page  # one that is mapped already, or not there at all
    return True


def _contents(found: Object, page: int) -> int:
    """Up to where a file's contents are to come in an object; up to its start if none are."""
    file = found.file
    if file is None or not found.accessible:
        return found.offset
    if file.size < 0:
        return found.end
    end = found.offset + max(0, file.size - found.file_offset)
    return min(found.end, end + -end % page)


def _half(start: int, end: int, page: int) -> int:
    """The end of the first half of a range, in whole pages; of one page, its end."""
    half = (end - start) // 2
    return start + max(page, half - half % page)


def _alike(backing: Backing, start: int, end: int) -> tuple[int, bool, bool]:
    """How far what is so at `start` is so: (end, it is there, it is in the stash)."""
    if (there := backing.next_data(start)) == start:
        return min(end, backing.next_absent(start)), True, False
    end = min(end, there)
    stash = backing.stash
    if stash is None:
        return end, False, False
    if (there := stash.next_data(start)) == start:
        return min(end, stash.next_absent(start)), False, True
    return min(end, there), False, False
