"""Contents that a sharer brings for memory that waits for them: an image is fetched, say.

A sharer that may write says of a range that its contents will come (AWAIT), and brings them,
in any order (FILL), in a memfd.  Others use the region meanwhile: who touches an absent page
there waits.  What has come is ordinary memory, written to or not, and does not come again: a
range is brought once, whoever brings it, and however often.  So who brings it may be killed
at any time, and another one goes on with what is left, which `maps` tells.

The pager puts the pages, as it does those of files, and for the same reason: nobody sees one
before it is filled, and what a reader has made in its place is taken out.  First they are put,
then it is written down that they are nobody's to bring any more.  If we die in between, they
are there, may have been written to, and are left as they are when they are brought again.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

import trio

from msharefsd.barriers import barrier
from msharefsd.errors import Refused
from msharefsd.journal.journal import Journal
from msharefsd.linux.uffd import Outcome
from msharefsd.memory import files
from msharefsd.paging import protection, removal
from msharefsd.paging.addressspace import (
    AddressSpaces,
    check_objects,
    forgetting,
    let_go_of_plain,
    to_the_end,
)
from msharefsd.paging.awaiting import PIECE
from msharefsd.paging.pages import pages_of
from msharefsd.paging.populate import Populate, Source
from msharefsd.paging.server import PageServer
from msharefsd.paging.window import Window, window_of
from msharefsd.region.objects import Object
from msharefsd.region.record import save_objects
from msharefsd.region.region import Region, Sharer
from msharefsd.threads.breath import Breath
from msharefsd.threads.pool import Threads

_AGAIN_SECONDS: Final = 0.01
_PATIENCE: Final = 1000
"""How often it is tried to put what a window does not take, or keeps from being protected."""
_AT_ONCE: Final = 4 << 20
"""So much is put before others have their turn (bytes)."""
_MOST_IDLE: Final = 2
"""So many pieces of memory are kept for the next one: new memory costs as much as the reading."""


class Bringing:
    """Puts what is brought."""

    def __init__(
        self, threads: Threads, journal: Journal, server: PageServer, spaces: AddressSpaces
    ) -> None:
        self._threads = threads
        self._journal = journal
        self._server = server
        self._populate: Populate = server.populate
        self._spaces = spaces
        self._idle: list[bytearray] = []

    async def fill(
        self, sharer: Sharer, offset: int, length: int, memory: int, close: Callable[[int], None]
    ) -> None:
        """Put contents, from the first byte of the memfd `memory` on, where they are awaited.

        `close` closes a duplicate of it: that may take its time.

        What is not awaited, or no more, stays as it is.  Raises Refused: EINVAL for a range
        that is not whole pages, or contents that end before it does; ENOMEM, EDQUOT if there
        is no memory for it, or no room for another object; EFAULT, EAGAIN if the sharer has
        no window there.
        """
        region = sharer.region
        self._spaces.check(region, offset, length)
        piece, end, at, breath = max(PIECE, region.page), offset + length, offset, Breath()
        while (item := region.objects.first(at, end)) is not None:
            at = item.end
            if item.awaited:
                start = item.offset
                at = min(at, start - start % piece + piece)
                data = self._idle.pop() if self._idle and piece == PIECE else bytearray(piece)
                await self._read(sharer, memory, start - offset, data, at - start, close)
                barrier("bring.read")
                view, step = memoryview(data)[: at - start], max(_AT_ONCE, region.page)
                for low in range(0, len(view), step):
                    await self._fill(sharer, start + low, view[low : low + step], breath)
                if len(data) == PIECE and len(self._idle) < _MOST_IDLE:
                    self._idle.append(data)
                removal.alive(region)
            await breath.take()
        async with region.change:
            at = offset
            while (item := region.objects.first(at, end)) is not None:
                at = item.end
                await let_go_of_plain(region, item)
                await breath.take()
                removal.alive(region)

    async def _read(
        self,
        sharer: Sharer,
        memory: int,
        offset: int,
        data: bytearray,
        length: int,
        close: Callable[[int], None],
    ) -> None:
        # Not into a buffer: a thread that nobody waits for any more would go on with that.  It
        # does so with `data`, which nobody uses again then.
        view = memoryview(data)[:length]
        try:
            read = partial(files.read, buffer=view, offset=offset, page=sharer.region.page)
            got = await files.apart(self._threads, sharer.uid, memory, read, close)
        except OSError as error:
            raise Refused(error.errno or errno.EIO, f"the contents: {error.strerror}") from error
        if got < length:
            raise Refused(errno.EINVAL, "the contents end before the range does")

    async def _fill(self, sharer: Sharer, start: int, data: memoryview, breath: Breath) -> None:
        """Put what is awaited of a piece: it may be many objects by now."""
        region, at, end = sharer.region, start, start + len(data)
        for _ in range(_PATIENCE):
            # What keeps it from being put is perhaps the sharer's own doing: nobody else
            # waits for that.
            async with region.change:
                removal.alive(region)
                await protection.settled(pages_of(region))
                while (item := region.objects.first(at, end)) is not None:
                    removal.alive(region)
                    if sharer.paging is None:
                        raise Refused(errno.ENOTCONN, "the sharer is gone")
                    if item.awaited:
                        part = data[item.offset - start : item.end - start]
                        if not self._put(window_of(sharer), item, part):
                            break
                        with to_the_end():
                            await self._repair(region, item, breath)
                    at = item.end
                    await breath.take()
                else:
                    return
            await trio.sleep(_AGAIN_SECONDS)
        raise Refused(errno.EAGAIN, "the window takes no page there now")

    def _put(self, window: Window, item: Object, data: memoryview) -> bool:
        """Put an object, of a piece; False if that is to be tried again.

        Nothing awaits here.
        """
        region = window.region
        check_objects(region, _more_objects(region, item))
        if not self._is_room(window, item):
            return False
        outcome, step = Outcome.DONE, pages_of(region).piece
        for at in range(0, item.length, step):
            part = item.part(item.offset + at, min(item.offset + at + step, item.end))
            outcome = self._put_part(window, part, data[at : at + part.length])
            if outcome not in (Outcome.DONE, Outcome.PRESENT):
                break
        if outcome is Outcome.RETRY:
            return False
        if outcome is Outcome.NO_MEMORY:
            raise Refused(errno.ENOMEM, "no memory for what is brought")
        if outcome not in (Outcome.DONE, Outcome.PRESENT):
            raise Refused(errno.EFAULT, "the window takes no page there")
        barrier("bring.put")
        self._is_there(region, item)
        return True

    def _put_part(self, window: Window, part: Object, data: memoryview) -> Outcome:
        # One buffer for each: what is copied late must never see what comes next.
        buffers = self._populate.buffers
        buffer = buffers.take(len(data))
        try:
            buffer.view[: len(data)] = data
            return self._populate_all(window, part, buffer.address)
        finally:
            buffers.give_back(buffer)

    def _is_room(self, window: Window, item: Object) -> bool:
        """Whether there is memory for it, or False if there may be some in a moment.

        Raises Refused(EDQUOT).
        """
        region = window.region
        backing = region.backing
        assert backing is not None
        pages_of(region).clean(item.offset, item.end)
        there = sum(
            min(high, item.end) - low for low, high in backing.data(item.offset, item.length)
        )
        absent = item.length - there
        if self._populate.room(region, absent) >= absent:
            return True
        if self._server.watching.relieve(window, item.offset):
            return False
        raise Refused(errno.EDQUOT, "more memory than the region, or its owner, may have")

    def _populate_all(self, window: Window, item: Object, address: int) -> Outcome:
        put = self._populate.put
        outcome = put(
            window, item.offset, item.end, address, guarded=item.guarded, source=Source.FILE
        )
        page = window.region.page
        if outcome is not Outcome.RETRY or item.length == page:
            return outcome
        # It lies in several VMAs.
        middle = item.offset + max(page, item.length // 2 // page * page)
        outcome = self._populate_all(window, item.part(item.offset, middle), address)
        if outcome not in (Outcome.DONE, Outcome.PRESENT):
            return outcome
        rest = item.part(middle, item.end)
        return self._populate_all(window, rest, address + middle - item.offset)

    def _is_there(self, region: Region, item: Object) -> None:
        """It has come: it is memory like any other from now on, and who waits looks again."""
        region.objects.insert(_brought(item))
        try:
            with forgetting(self._journal, region, [(item.offset, item.end)]):
                save_objects(self._journal, region)
        except Refused:
            region.objects.insert(item)
            raise
        barrier("bring.done")
        removal.let_go(region, [item])
        for window, low, high in pages_of(region).awaiting.brought(item.offset, item.end):
            if window.attached:
                protection.attempt(window.wake, low, high)

    async def _repair(self, region: Region, item: Object, breath: Breath) -> None:
        """Who had SIGBUS there has what was brought."""
        for window in list(pages_of(region).refused):
            if window.attached:
                self._server.poison.read(window, item.offset, item.end, by_others=True)
                await breath.take()
                removal.alive(region)


def _brought(item: Object) -> Object:
    return replace(item, file=None, file_offset=0)


def _more_objects(region: Region, item: Object) -> int:
    """How many objects more there are when a part of one that is awaited has come."""
    new, whole = _brought(item), region.objects.find(item.offset)
    before, after = region.objects.find(item.offset - 1), region.objects.find(item.end)
    more = 0
    if before is not None:
        more += 1 if before is whole else -before.merges_with(new)
    if after is not None:
        more += 1 if after is whole else -new.merges_with(after)
    return max(0, more)
