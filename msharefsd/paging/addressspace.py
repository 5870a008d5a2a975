"""A region's address space: the calls that change what is mapped in it.

One process's call holds for all of them at once.  Nobody's code runs for that:
memory is unmapped by punching it out of the backing (the kernel unmaps it
everywhere), a new object needs nothing but the region's map, and protection is
protection.py's.  So a sharer that is stopped delays nobody.

What a call is about to do is written down before memory changes, so that the next
daemon finishes it should this one be killed in the middle (journal.py).

Each call holds the region's `change` lock to its end; page faults do not, so
between two awaits the map, the memory and the protection must fit together.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import trio

from msharefsd.barriers import barrier
from msharefsd.errors import Refused
from msharefsd.journal.journal import Journal
from msharefsd.linux import syscalls
from msharefsd.linux.features import Capabilities
from msharefsd.linux.syscalls import HUGE_PAGE
from msharefsd.paging import protection, removal
from msharefsd.paging.background import AGAIN_SECONDS
from msharefsd.paging.lanes import Waits
from msharefsd.paging.pages import Pages, pages_of
from msharefsd.paging.server import PageServer
from msharefsd.paging.watch import is_plain
from msharefsd.paging.writeback import Writeback
from msharefsd.region.objects import MOST_OBJECTS, Object
from msharefsd.region.record import save_objects
from msharefsd.region.region import Region, Sharer
from msharefsd.threads.breath import Breath

_TRIES: Final = 20
_PAUSE: Final = 0.02
"""How often, and with what pauses (seconds), a call itself has pages come in place of poison."""
_PROTECTIONS: Final = syscalls.PROT_READ | syscalls.PROT_WRITE | syscalls.PROT_EXEC


class AddressSpaces:
    """Changes the address spaces of regions.

    Offsets and lengths are bytes from the region's start; every method raises
    Refused with the errno that the system call of its name would give.  `by` is the
    sharer whose call it is: that it is done is written down with what it did.
    """

    def __init__(
        self, capabilities: Capabilities, server: PageServer, writeback: Writeback, journal: Journal
    ) -> None:
        self._journal = journal
        self._capabilities = capabilities
        self._server = server
        self._writeback = writeback

    def check(self, region: Region, offset: int, length: int) -> None:
        """Raise Refused(EINVAL) for a range that is not whole pages of the region."""
        if length == 0 or offset < 0 or offset + length > region.size:
            raise Refused(errno.EINVAL, "the range does not lie in the region")
        if offset % region.page or length % region.page:
            raise Refused(errno.EINVAL, f"not in whole pages of the region: {region.page} bytes")

    def _check_prot(self, new: Object, code: int) -> None:
        if new.prot & syscalls.PROT_EXEC:
            raise Refused(
                code, "memory of a region cannot be executed: /dev/shm is no place for it"
            )
        if new.guarded and new.accessible and not self._capabilities.write_protect:
            raise Refused(errno.EOPNOTSUPP, "this kernel cannot protect it (Linux 5.19)")

    async def mmap(
        self, region: Region, new: Object, *, replace: bool, by: Sharer | None = None
    ) -> None:
        """Put an object in; with `replace` in place of what is there, else EEXIST."""
        self.check(region, new.offset, new.length)
        self._check_prot(new, errno.EPERM)
        if replace:
            await self._write_back(region, new.offset, new.end)
        pages, waits = pages_of(region), Waits()
        async with region.change:
            occupied = region.objects.first(new.offset, new.end) is not None
            if occupied and not replace:
                raise Refused(errno.EEXIST, "something is mapped there: MAP_FIXED replaces it")
            check_objects(region, 1 + _splits(region, new.offset, new.end))
            protection.arm_for(pages, new)
            await protection.settled(pages)
            removal.alive(region)
            with removal.leaving(region, new.offset, new.end):
                if occupied:
                    await self._write_back(region, new.offset, new.end)
                    removal.alive(region)
                with to_the_end():
                    await self._thin_out(region, new.offset, new.end)
                    removed = self._put(region, new.offset, new.length, new, by)
                    barrier("mmap")
                    # A page that was there before, or is poison, must not show through.
                    await self._finish_removal(region, new.offset, new.length, removed)
                    removal.alive(region)
                    await self._server.poison.clear(
                        pages, new.offset, new.length, empty=True, waits=waits
                    )
                    await self._cleared(region)
                    await let_go_of_plain(region, new)
        if new.accessible:
            await self._bring_where_poison_is(pages, new, waits)

    async def _bring_where_poison_is(self, pages: Pages, new: Object, waits: Waits) -> None:
        """Who may write to what is mapped may touch it when that returns.

        What is left to do is to read a file, which nobody else waits for; and what was late in
        processes of other users.  What cannot be put there just now is tried again some times;
        and then by hunger.py.
        """
        readers = new.file is not None  # who come with it; and are not waited for
        if not _are_starved(pages, new, waits) and not (readers and _are_poisoned(pages, new)):
            return  # and what others read there is not waited for
        for _ in range(_TRIES):
            await self._server.poison.clear(
                pages, new.offset, new.length, readers=readers, waits=waits
            )
            await self._server.fills.finished(pages, new.offset, new.end)
            if not _are_starved(pages, new, waits):
                return
            await trio.sleep(_PAUSE)

    async def _cleared(self, region: Region) -> None:
        """What was to be cleared is, and the next daemon is not to clear it again.

        Nobody may write there before that is written down, and the call cannot be undone.
        So where there is no room for it (a full disk) it waits for some.
        """
        while True:
            removal.alive(region)
            try:
                self._journal.cleared(region.id)
            except Refused:
                await trio.sleep(AGAIN_SECONDS)
            else:
                return

    async def _thin_out(self, region: Region, start: int, end: int) -> None:
        """Take objects out until few are left in the range: those go in one piece.

        Map, journal and memory of one piece change without a pause, and a pause there
        must be.  If we die in between there are holes, and the call comes again.
        """
        while (past := region.objects.past(start, end, removal.AT_ONE_TIME)) is not None:
            removed = self._put(region, start, past - start, None, None)
            await self._finish_removal(region, start, past - start, removed)
            removal.alive(region)
            start = past

    def _put(
        self, region: Region, offset: int, length: int, new: Object | None, by: Sharer | None
    ) -> list[Object]:
        """Have `new` in the map, or a hole, and written down; returns what was there before.

        The memory of the range is the caller's to discard.
        """
        removed = region.objects.insert(new) if new else region.objects.remove(offset, length)
        try:
            with forgetting(self._journal, region, [(offset, offset + length)]):
                save_objects(
                    self._journal,
                    region,
                    by=by,
                    gone=(offset, length),
                    # A hole has no memory anyway, which the next daemon sees to.
                    clearing=[(offset, length)] if new else [],
                    mapping=True,
                )
        except Refused:
            region.objects.remove(offset, length)
            for item in removed:
                region.objects.insert(item)
            raise
        if new is not None and new.file is not None:
            new.file.hold()
        removal.let_go(region, removed)
        return removed

    async def _finish_removal(
        self, region: Region, offset: int, length: int, removed: list[Object]
    ) -> None:
        await removal.clean(region, offset, offset + length)
        await removal.discard(region, offset, length)
        # Punching leaves the protection where a page was mapped.
        if any(item.guarded for item in removed):
            await protection.unprotect(pages_of(region), offset, offset + length)

    async def donate(self, region: Region, new: Object) -> None:
        """Put an object in whose contents the donor has copied into the backing."""
        self.check(region, new.offset, new.length)
        self._check_prot(new, errno.EOPNOTSUPP)
        async with region.change:
            if region.objects.first(new.offset, new.end) is not None:
                raise Refused(errno.EINVAL, "the donor's mappings overlap")
            check_objects(region, 1)
            protection.arm_for(pages_of(region), new)
            await protection.settled(pages_of(region))
            region.objects.insert(new)

    async def hide_donated(self, region: Region) -> None:
        """The donor's PROT_NONE memory is copied: out of reach with it."""
        for item in list(region.objects):
            if not item.accessible:
                await self.hide(region, item)

    async def munmap(
        self, region: Region, offset: int, length: int, by: Sharer | None = None
    ) -> None:
        """Make a hole; returns when nobody has the memory any more."""
        self.check(region, offset, length)
        # Most of it now: a file that takes its time holds up nobody's calls.
        await self._write_back(region, offset, offset + length)
        async with region.change:
            check_objects(region, _splits(region, offset, offset + length))
            if pages_of(region).looked_at:
                protection.arm(pages_of(region), offset, offset + length)
                await protection.settled(pages_of(region))
                removal.alive(region)
            with removal.leaving(region, offset, offset + length):
                await self._write_back(region, offset, offset + length)
                removal.alive(region)
                with to_the_end():
                    await self._thin_out(region, offset, offset + length)
                    removed = self._put(region, offset, length, None, by)
                    barrier("munmap")
                    await self._finish_removal(region, offset, length, removed)

    async def _write_back(self, region: Region, start: int, end: int) -> None:
        with contextlib.suppress(OSError):  # it has been logged
            await self._writeback.flush(region, start, end)

    async def mprotect(
        self, region: Region, offset: int, length: int, prot: int, by: Sharer | None = None
    ) -> None:
        """Change the protection; up to the first hole, then ENOMEM, as mprotect(2) does."""
        self.check(region, offset, length)
        if prot & ~_PROTECTIONS:
            raise Refused(errno.EINVAL, "unknown protection bits")
        async with region.change:
            if prot == syscalls.PROT_NONE:
                await _check_awaited(region, offset, length)
            at, end, breath, waits = offset, offset + length, Breath(), Waits()
            while (item := region.objects.first(at, end)) is not None and item.offset == at:
                new = replace(item, prot=prot)
                self._check_prot(new, errno.EACCES)
                if prot != item.prot:
                    whole = region.objects.find(item.offset)
                    assert whole is not None
                    check_objects(region, (whole.offset < item.offset) + (item.end < whole.end))
                if new.written_back and new.writable and item.file and not item.file.may_write:
                    raise Refused(errno.EACCES, "the file was not opened O_RDWR")
                await self._protect(region, item, prot, by if item.end == end else None, waits)
                at = item.end
                await breath.take()
                removal.alive(region)
            if at != end:
                raise Refused(errno.ENOMEM, "part of the range is not mapped")

    async def _protect(
        self, region: Region, item: Object, prot: int, by: Sharer | None, waits: Waits
    ) -> None:
        if item.prot == prot:
            return
        if prot == syscalls.PROT_NONE and item.written_back:
            with removal.leaving(region, item.offset, item.end):
                await self._write_back(region, item.offset, item.end)
        removal.alive(region)
        with to_the_end():
            await self._apply(region, item, replace(item, prot=prot), by, waits)

    async def _apply(
        self, region: Region, item: Object, new: Object, by: Sharer | None, waits: Waits
    ) -> None:
        watch = pages_of(region).watch
        if new.guarded:
            self._prepare_to_protect(region, new)
            await protection.settled(pages_of(region))
            removal.alive(region)
        if watch is not None and not new.accessible:
            watch.hiding.add(new.offset, new.end)
        try:
            await self._change(region, item, new, by, waits)
        finally:
            if watch is not None:
                watch.hiding.remove(new.offset, new.end)

    async def _change(
        self, region: Region, item: Object, new: Object, by: Sharer | None, waits: Waits
    ) -> None:
        prot = new.prot
        region.objects.protect(item.offset, item.length, prot)
        try:
            save_objects(self._journal, region, by=by)
        except Refused:
            region.objects.protect(item.offset, item.length, item.prot)
            raise
        barrier("mprotect")
        if not new.accessible:
            await self._server.poison.clear(pages_of(region), new.offset, new.length, waits=waits)
            removal.alive(region)
            try:
                await self.hide(region, new)
            except Refused:
                region.objects.protect(item.offset, item.length, item.prot)
                save_objects(self._journal, region)
                if not item.guarded:
                    await protection.unprotect(pages_of(region), item.offset, item.end)
                raise
        elif new.guarded:
            await protection.protect_present(pages_of(region), new.offset, new.end)
        else:
            await protection.unprotect(pages_of(region), new.offset, new.end)
        if new.accessible and not item.accessible:
            removal.alive(region)
            await self._server.poison.clear(pages_of(region), new.offset, new.length, waits=waits)
            removal.alive(region)
        await let_go_of_plain(region, new)

    def _prepare_to_protect(self, region: Region, new: Object) -> None:
        assert region.backing is not None
        protection.arm_for(pages_of(region), new)
        if (
            not new.accessible
            and not self._capabilities.write_protect
            and (region.backing.next_data(new.offset) < new.end)
        ):
            raise Refused(errno.EOPNOTSUPP, "this kernel cannot protect it (Linux 5.19)")

    async def hide(self, region: Region, item: Object) -> None:
        """PROT_NONE: nobody can reach the pages, and their contents stay."""
        pages, breath = pages_of(region), Breath()
        step = max(HUGE_PAGE, region.page)
        spans, parts = await removal.plan(
            await protection.present(region, item.offset, item.end), step
        )
        for start, end in spans:
            protection.arm(pages, start, end)
            await breath.take()
        await protection.protect_present(pages, item.offset, item.end)
        for start, end in parts:
            removal.alive(region)
            assert region.backing is not None
            try:
                pages.stash(start, end)
            except OSError as error:
                code = error.errno or errno.ENOMEM
                raise Refused(code, "no memory to move it to") from error
            await trio.lowlevel.checkpoint()

    async def msync(self, region: Region, offset: int, length: int) -> None:
        """Written data of MAP_SHARED files is in the files when this returns (MS_SYNC)."""
        self.check(region, offset, length)
        try:
            await self._writeback.sync(region, offset, offset + length)
        except OSError as error:
            raise Refused(error.errno or errno.EIO, f"msync: {error.strerror}") from error
        if not region.objects.covers(offset, length):
            raise Refused(errno.ENOMEM, "part of the range is not mapped")

    async def discard(
        self, region: Region, offset: int, length: int, by: Sharer | None = None
    ) -> None:
        """madvise(MADV_DONTNEED): private memory starts fresh at the next touch.

        For shared mappings it changes nothing: their contents stay.
        """
        self.check(region, offset, length)
        async with region.change:
            if region.backing is None:
                return
            await _check_awaited(region, offset, length)
            # Nobody may write to what the next daemon would discard again.
            with removal.leaving(region, offset, offset + length), to_the_end():
                private = await removal.some_private(region, offset, offset + length)
                while True:
                    after = private[-1].end if private else offset + length
                    rest = await removal.some_private(region, after, offset + length)
                    with forgetting(
                        self._journal, region, [(item.offset, item.end) for item in private]
                    ):
                        save_objects(
                            self._journal,
                            region,
                            by=None if rest else by,
                            clearing=[(item.offset, item.length) for item in private],
                        )
                    for item in private:
                        for fill in pages_of(region).fills(item.offset, item.end):
                            fill.stale = True
                        await removal.discard(region, item.offset, item.length)
                    await self._cleared(region)
                    if not rest:
                        break
                    private = rest
            if not region.objects.covers(offset, length):
                raise Refused(errno.ENOMEM, "part of the range is not mapped")


def _are_poisoned(pages: Pages, new: Object) -> bool:
    return any(any(each.poisoned.within(new.offset, new.end)) for each in pages.refused)


def _are_starved(pages: Pages, new: Object, waits: Waits) -> bool:
    """Whether a writer lacks something of what has been mapped, and is waited for."""
    return any(
        any(each.starved.within(new.offset, new.end))
        for each in pages.refused
        if each.writable and (waits.left(each.sharer.uid) if each.far else new.file)
    )


def to_the_end() -> trio.CancelScope:
    """For what has begun to change a region, and must end although its caller is dead.

    Otherwise the map would say one thing and the memory another: a hole with pages in it.
    Nothing in there waits for a file.
    """
    return trio.CancelScope(shield=True)


@contextlib.contextmanager
def forgetting(journal: Journal, region: Region, ranges: list[tuple[int, int]]) -> Iterator[None]:
    """With what is written down meanwhile: nothing in these is put any more."""
    watch = pages_of(region).watch
    if watch is None:
        yield
        return
    with journal.transaction():
        watch.write_gone(ranges)
        yield
    for start, end in ranges:
        watch.forget(start, end)


async def let_go_of_plain(region: Region, new: Object) -> None:
    """An object is there now: if its memory is plain nobody need look at what comes there.

    But for what is in the stash: zeros in its place would be wrong.
    """
    pages, backing = pages_of(region), region.backing
    if backing is None or not pages.looked_at or not is_plain(new):
        return
    if backing.stash is None or backing.stash.next_data(new.offset) >= new.end:
        await protection.disarm(pages, new.offset, new.end)


async def _check_awaited(region: Region, offset: int, length: int) -> None:
    """Raise Refused(EBUSY) if contents of the range are still to be brought.

    They would come to where nothing is to come any more.
    """
    breath, at, end = Breath(), offset, offset + length
    while (item := region.objects.first(at, end)) is not None:
        if item.awaited:
            raise Refused(errno.EBUSY, "its contents are still to come: wait until it is filled")
        at = item.end
        await breath.take()


def _splits(region: Region, start: int, end: int) -> int:
    """How many objects more there are when [start, end) is taken out: 1 or 0."""
    found = region.objects.find(start)
    return int(found is not None and found.offset < start and end < found.end)


def check_objects(region: Region, more: int) -> None:
    """Raise Refused(ENOMEM) if there may not be that many more objects."""
    if more and len(region.objects) + more > MOST_OBJECTS:
        raise Refused(errno.ENOMEM, "too many objects in the region")
    if more:
        region.account.check_objects(more)
