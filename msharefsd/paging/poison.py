"""Poison: pages that raise SIGBUS in one sharer, without asking us again.

UFFDIO_POISON leaves a marker in the sharer's page table.  What holds of markers:

- Where we put one is known (`Window.poisoned`) and written down, before it is there
  and until after it is gone: nobody else would ever find it.
- The kernel takes a marker away for one thing only: a page that comes there.  A page
  that is in the backing already comes by UFFDIO_CONTINUE, which takes MINOR mode.
- A hole's is right as long as it is a hole.  Where something is mapped it has to go,
  before the call returns that maps it.
- In a hole nothing is ever put to clear one: others could see it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Final

from msharefsd.barriers import barrier
from msharefsd.errors import Refused
from msharefsd.journal.journal import Journal
from msharefsd.linux.features import Capabilities
from msharefsd.linux.uffd import Mode, Outcome
from msharefsd.paging.fills import Fills
from msharefsd.paging.hunger import Hunger
from msharefsd.paging.pages import Pages, Waiting, pages_of
from msharefsd.paging.populate import Part, Populate
from msharefsd.paging.window import Window
from msharefsd.region.objects import Object
from msharefsd.telemetry.seldom import Seldom
from msharefsd.threads.breath import Breath

log = logging.getLogger(__name__)

MOST_POISONED: Final = 1 << 16
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

    def known(self, window: Window, offset: int) -> Outcome:
        """Poison the page of a hole, or of what cannot be had, and remember that."""
        page = window.region.page
        known = offset in window.poisoned or len(window.poisoned) < MOST_POISONED
        if known:
            self._journal.add_poisoned(window.sharer.number, offset)
        outcome = self.fleeting(window, offset)
        if outcome is Outcome.PRESENT and self._forget_protection(window, offset, page):
            outcome = self.fleeting(window, offset)
        if outcome is Outcome.DONE:
            if known:
                window.poisoned.add(offset)
                pages_of(window.region).refused.add(window)
            elif self._seldom.now((window.region.id, "poisoned")):
                log.warning(
                    "process %d touches holes of region %s all over: some of them stay holes "
                    "for it whatever is mapped there",
                    window.sharer.pid,
                    window.region.label(),
                )
        return outcome

    def fleeting(self, window: Window, offset: int) -> Outcome:
        """Poison a page without remembering it: it is nothing of the region's."""
        end = offset + window.region.page
        outcome = window.poison(offset, end) if self._capabilities.poison else Outcome.RETRY
        # PRESENT: poisoned or populated meanwhile.
        window.wake(offset, end)
        return outcome

    def _forget_protection(self, window: Window, offset: int, page: int) -> bool:
        """Take away a marker that write protection has left where no page is.

        A daemon that died between the two leaves one where it has freed a page, and
        poison does not replace it: the thread would try again for ever.  A page that
        comes is protected anew.
        """
        backing = window.region.backing
        if backing is None or backing.next_data(offset) == offset:
            return False
        with contextlib.suppress(OSError):  # not registered for it: no marker
            window.unprotect(offset, offset + page, wake=False)
        return True

    # -- repair --

    async def clear(self, pages: Pages, offset: int, length: int, *, empty: bool = False) -> None:
        """Make every sharer ask again for pages of objects in the range that raise SIGBUS.

        The kernel has no call for that; a page that comes into a sharer takes the
        marker's place.  Where nobody may touch anything one is put there and punched out
        again, and so in a range that is being mapped (`empty`): who has called mmap() may
        touch it when that returns, and a file may take its time.  Elsewhere it is the
        page itself.  In a hole SIGBUS is right, and others could see what is put there.

        The region may be gone when this returns.
        """
        region = pages.region
        end = offset + length
        breath = Breath()
        for window in list(pages.refused):
            if len(window.poisoned) <= length // region.page:
                poisoned = [page for page in window.poisoned if offset <= page < end]
            else:
                some = range(offset, end, region.page)
                poisoned = [page for page in some if page in window.poisoned]
            for page in sorted(poisoned):
                await breath.take()
                if not window.attached:
                    break
                found = region.objects.find(page)
                if empty:
                    self._clear(window, page)
                elif found is not None and found.accessible:
                    self.repair(window, found, page)
                elif found is not None:
                    self._clear_hidden(window, found, page)
            if not window.poisoned:
                pages.refused.discard(window)

    def _clear(self, window: Window, page: int, content: int | None = None) -> None:
        """Replace the marker by a page with that content, or zeros, and free it again."""
        backing = window.region.backing
        assert backing is not None
        outcome = self._populate.put(window, page, page + backing.page, content, guarded=False)
        if outcome in _LATER:
            # Something may be mapped there in a moment: then the page is the region's.
            self._hunger.notice(window, page)
            return
        self._map(window, page, by_others=outcome is Outcome.PRESENT)
        barrier("poison.cleared")
        backing.punch(page, backing.page)  # at once: everybody sees what is there
        self._cleared(window, page)

    def _clear_hidden(self, window: Window, found: Object, page: int) -> None:
        """In an object that nobody may touch: what belongs there stays where it is.

        If we die before the page is freed, the next daemon takes it for the object's.  So
        it has what is in the stash, if anything is; and a page of a file that was not
        read yet is written down as one that is to go.
        """
        region = window.region
        backing = region.backing
        assert backing is not None
        if backing.next_data(page) == page:  # populated by another, and not hidden yet
            self.mapped(window, page, by_others=True)
        elif backing.stash is not None and backing.is_stashed(page):
            buffer = self._populate.buffers.take(backing.page)
            try:
                os.preadv(backing.stash.fd, [buffer.view[: backing.page]], page)
                self._clear(window, page, buffer.address)
            finally:
                self._populate.buffers.give_back(buffer)
        else:
            if found.file is not None:
                try:
                    self._journal.add_clearing(region.id, page, backing.page)
                except Refused:
                    return  # a touch is SIGBUS then, and not SIGSEGV
            self._clear(window, page)

    def repair(self, window: Window, found: Object, page: int) -> None:
        """Populate a poisoned page of an object in this sharer; or not, for want of memory."""
        region = window.region
        backing = region.backing
        assert backing is not None
        end = page + backing.page
        if backing.next_data(page) == page:
            self.mapped(window, page, by_others=True)
            return
        stashed = backing.is_stashed(page)
        if not stashed and self._populate.room(region, backing.page) < backing.page:
            self._hunger.notice(window, page)
            return
        if found.file is not None and not stashed:
            self._fills.read(found, page, end, Waiting(window, page, None))
            return
        outcome = self._populate.fill(window, found, Part(page, end, stashed))
        if outcome in _LATER:
            self._hunger.notice(window, page)
        else:
            self.mapped(window, page, by_others=outcome is Outcome.PRESENT)

    def mapped(self, window: Window, offset: int, *, by_others: bool) -> None:
        """A poisoned page has been populated: see that the sharer has the page now.

        If it came into this very sharer, it has replaced the marker.  If not, only
        UFFDIO_CONTINUE replaces it, which takes MINOR mode.
        """
        self._map(window, offset, by_others=by_others)
        # Not before: nobody would know of the marker if we died in between.
        self._cleared(window, offset)

    def _cleared(self, window: Window, offset: int) -> None:
        if offset in window.poisoned:
            window.poisoned.discard(offset)
            self._journal.forget_poisoned(window.sharer.number, offset)
        window.starved.discard(offset)

    def _map(self, window: Window, offset: int, *, by_others: bool) -> None:
        region = window.region
        backing, pages = region.backing, pages_of(region)
        assert backing is not None
        if window.writable:
            slot = backing.shared_slot(offset)
            if slot is not None and not any(True for _ in pages.armed.within(*slot)):
                return  # what came into one page table came into all of them
            if not by_others and backing.charges_sharer:
                return
        if not self._capabilities.map_present:
            return
        found = region.objects.find(offset)
        # What nobody may touch is armed and protected when it is hidden.
        armed = window.writable and pages.armed.contains(offset)
        guarded = found is not None and found.guarded and armed
        # Registering anew for MINOR takes away every mode that is not asked for again
        # (userfaultfd_register_range(), mm/userfaultfd.c).
        mode = Mode.MISSING | Mode.MINOR | (Mode.WP if armed else Mode(0))
        with contextlib.suppress(OSError):  # the window is gone, or the process
            window.register(offset, offset + backing.page, mode)
            window.map_present(offset, offset + backing.page, protect=guarded)
