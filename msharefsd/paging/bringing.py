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
from dataclasses import replace
from functools import partial
from typing import Final

import trio

from msharefsd.barriers import barrier
from msharefsd.errors import Refused
from msharefsd.journal.journal import Journal
from msharefsd.linux.uffd import Outcome
from msharefsd.memory.files import MappedFile
from msharefsd.paging import protection, removal
from msharefsd.paging.addressspace import AddressSpaces, forgetting, let_go_of_plain
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
"""How often it is tried to put what another process's window keeps from being protected."""


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

    async def fill(self, sharer: Sharer, offset: int, length: int, content: MappedFile) -> None:
        """Put contents, from the first byte of `content` on, where they are awaited.

        What is not awaited, or no more, stays as it is.  Raises Refused: EINVAL for a range
        that is not whole pages, or contents that end before it does; ENOMEM, EDQUOT if there
        is no memory for it; EFAULT if the sharer has no window there.
        """
        region = sharer.region
        self._spaces.check(region, offset, length)
        piece, end, at, breath = pages_of(region).piece, offset + length, offset, Breath()
        while (item := region.objects.first(at, end)) is not None:
            at = item.end
            if item.awaited:
                start = item.offset
                at = min(at, start - start % piece + piece)
                await self._fill(sharer, start, at, content, start - offset)
                removal.alive(region)
            await breath.take()
        async with region.change:
            at = offset
            while (item := region.objects.first(at, end)) is not None:
                at = item.end
                await let_go_of_plain(region, item)
                await breath.take()
                removal.alive(region)

    async def _fill(
        self, sharer: Sharer, start: int, end: int, content: MappedFile, at: int
    ) -> None:
        region, buffers = sharer.region, self._populate.buffers
        # Not into a buffer: a thread that nobody waits for any more would go on with that.
        data = memoryview(bytearray(end - start))
        try:
            got = await self._threads.run(sharer.uid, partial(content.read, data, at, region.page))
        except OSError as error:
            raise Refused(error.errno or errno.EIO, f"the contents: {error.strerror}") from error
        if got < len(data):
            raise Refused(errno.EINVAL, "the contents end before the range does")
        barrier("bring.read")
        async with region.change:
            buffer = buffers.take(len(data))
            try:
                buffer.view[: len(data)] = data
                for _ in range(_PATIENCE):
                    removal.alive(region)
                    if sharer.paging is None:
                        raise Refused(errno.ENOTCONN, "the sharer is gone")
                    if self._put_all(window_of(sharer), start, end, buffer.address):
                        return
                    await trio.sleep(_AGAIN_SECONDS)
                raise Refused(errno.EAGAIN, "another process's memory cannot be protected now")
            finally:
                buffers.give_back(buffer)

    def _put_all(self, window: Window, start: int, end: int, address: int) -> bool:
        """Put what is awaited in [start, end); False if a part of it is to be tried again.

        Nothing awaits here.
        """
        region = window.region
        for item in region.objects.within(start, end - start):
            if item.awaited:
                source = address + item.offset - start
                outcome = self._populate_all(window, item, source)
                if outcome is Outcome.RETRY:
                    return False
                if outcome is Outcome.NO_MEMORY:
                    raise Refused(errno.ENOMEM, "no memory for what is brought")
                if outcome not in (Outcome.DONE, Outcome.PRESENT):
                    raise Refused(errno.EFAULT, "the window takes no page there")
                barrier("bring.put")
                self._is_there(region, item)
        return True

    def _populate_all(self, window: Window, item: Object, address: int) -> Outcome:
        region = window.region
        if self._populate.room(region, item.length) < item.length:
            raise Refused(errno.EDQUOT, "more memory than the region, or its owner, may have")
        put = self._populate.put
        return put(window, item.offset, item.end, address, guarded=item.guarded, source=Source.FILE)

    def _is_there(self, region: Region, item: Object) -> None:
        """It has come: it is memory like any other from now on."""
        pages = pages_of(region)
        region.objects.insert(replace(item, file=None, file_offset=0))
        try:
            with forgetting(self._journal, region, [(item.offset, item.end)]):
                save_objects(self._journal, region)
        except Refused:
            region.objects.insert(item)
            raise
        barrier("bring.done")
        removal.let_go(region, [item])
        for window in list(pages.refused):
            if window.attached:
                self._server.poison.read(window, item.offset, item.end, by_others=True)
        for window, low, high in pages.awaiting.brought(item.offset, item.end):
            if window.attached:
                protection.attempt(window.wake, low, high)
