"""Dirty pages of MAP_SHARED files go back to their files.

What holds of them:

- A page is dirty from the first write to it until it has been written.  Write
  protection tells of the first write, in each sharer; that is written down before the
  write is let through, and struck out after the file has it.
- To write it, the page is protected again in those who could write, then read, then
  written, in this order: what is written to it in between makes it dirty anew.
- A page with a robust mutex that somebody holds is not left protected: a thread that ends
  cannot wait for us (PF_EXITING, handle_userfault()), and whoever waits for the mutex would
  never be told that its owner has died.  So it stays dirty, and is written every time.
- A page is of the file (`Dirty`) that the map had there when it became dirty.  Who
  replaces an object takes its dirty pages out before anybody can write there again; if
  the map says another file now, or none, the page is nobody's to write.
- What is on its way to a file is not dirty, and not there yet: whoever must not
  overtake that waits for the file's lock (`Dirty.writing` says whose).
- Only one at a time writes to a file, in a task that outlives who has asked.

Dirty pages are written by msync(), before munmap() and replacement take effect,
every few seconds, and before the region's memory is freed.  Until a page is in its
file it stays in the backing, so the daemon's death loses none.

All of it costs what is dirty, of the files it is about, and not what is mapped.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from msharefsd.barriers import barrier
from msharefsd.journal.journal import Journal
from msharefsd.linux import robust
from msharefsd.memory.buffers import BUFFER
from msharefsd.memory.files import MappedFile
from msharefsd.paging import protection
from msharefsd.paging.pages import pages_of
from msharefsd.paging.window import Window
from msharefsd.region.region import Region, State
from msharefsd.telemetry.metrics import Metrics
from msharefsd.telemetry.seldom import Seldom
from msharefsd.threads.breath import Breath
from msharefsd.threads.pool import Threads

log = logging.getLogger(__name__)

INTERVAL: Final = 5.0
"""Seconds between the rounds; the kernel's own default (vm.dirty_writeback_centisecs)."""
ROUNDS: Final = 16
"""How many files of a user's are written at one time, of those that nobody waits for."""
AT_ONE_TIME: Final = 256
"""How many objects of a region that is gone go at one time."""
MOST_CLEAN: Final = 512
"""How many pages that turn out to be no file's are left out at one time."""
LOOKING_SECONDS: Final = 1.0
"""How long a process may take to be looked into."""
LAST_SECONDS: Final = 30.0
"""How long the daemon's end waits for files that do not answer."""


@dataclass(slots=True)
class _Run:
    """Dirty pages side by side in one file."""

    file: MappedFile
    offset: int
    length: int
    file_offset: int
    writers: set[Window]

    def extend(self, page: int, size: int, file_offset: int, writers: set[Window]) -> bool:
        """Take in a page of `size` bytes, if it lies behind it and there is room."""
        behind = (self.offset + self.length, self.file_offset + self.length)
        if (page, file_offset) != behind or self.length >= BUFFER:
            return False
        self.length += size
        self.writers |= writers
        return True


@dataclass(eq=False, slots=True)
class _Flush:
    """A flush that goes on whatever becomes of who asked for it."""

    done: trio.Event = field(default_factory=trio.Event)
    failure: Exception | None = field(
        default_factory=lambda: OSError(errno.EINTR, "the daemon is stopping")
    )
    """What it came to; None once all is written."""


@dataclass(eq=False, slots=True)
class _Rounds:
    """The files of a user's that are to be written."""

    waiting: dict[MappedFile, Region] = field(default_factory=dict)
    at_work: int = 0


class Writeback:
    """Writes the dirty pages of all regions of one daemon."""

    def __init__(self, threads: Threads, metrics: Metrics, journal: Journal) -> None:
        self._journal = journal
        self._threads = threads
        self._metrics = metrics
        self._seldom = Seldom()
        self._released: list[Region] = []
        self._rounds: dict[int, _Rounds] = {}
        self._wanted = trio.Event()
        self._nursery: trio.Nursery | None = None

    async def flush(self, region: Region, start: int, end: int) -> None:
        """Write what is dirty in [start, end); returns when it is written.

        Raises OSError, the first that a file gave: what could not be written stays
        dirty.
        """
        failure: OSError | None = None
        for file in await pages_of(region).dirty.concerned(start, end, region.page):
            try:
                await self._flush_file(region, file, start, end)
            except OSError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    async def _flush_file(self, region: Region, file: MappedFile, start: int, end: int) -> None:
        """Flush what is dirty of one file.

        In a task of its own: whoever asked may be killed while a thread still writes,
        and nobody may write newer contents before that thread has written the older.
        """
        assert self._nursery is not None, "run() is not running"
        flush = _Flush()
        self._nursery.start_soon(self._flush_in_turn, region, file, start, end, flush)
        await flush.done.wait()
        if flush.failure is not None:
            raise flush.failure

    async def _flush_in_turn(
        self, region: Region, file: MappedFile, start: int, end: int, flush: _Flush
    ) -> None:
        if not file.in_use:  # unmapped meanwhile: it has been written for that
            flush.failure = None
            flush.done.set()
            return
        file.hold()
        try:
            await self._flush_alone(region, file, start, end)
            flush.failure = None
        except Exception as error:  # noqa: BLE001 # it is the caller's
            flush.failure = error
        finally:
            file.let_go()
            flush.done.set()

    async def _flush_alone(self, region: Region, file: MappedFile, start: int, end: int) -> None:
        # Also for pages that are not dirty any more, because somebody else is writing
        # them just now: msync() must not overtake that.
        async with file.flushing:
            failure: OSError | None = None
            # Each run as it is when its turn comes: while one is written other sharers
            # write to the rest, and objects change.
            while start < end:
                run, start = self._next_run(region, file, start, end)
                try:
                    if run is None:
                        await trio.lowlevel.checkpoint()
                    elif not await self._write(region, run):
                        start = run.offset
                except OSError as error:
                    failure = failure or error
        if failure is not None:
            raise failure

    def _next_run(
        self, region: Region, file: MappedFile, start: int, end: int
    ) -> tuple[_Run | None, int]:
        """The first dirty pages of the file in [start, end) that lie side by side.

        And where to look for the next; perhaps there are none before that.
        """
        run: _Run | None = None
        clean: list[int] = []
        backing, dirty = region.backing, pages_of(region).dirty
        if backing is None:
            return None, end
        after = end
        for page in dirty.of(file, start, end):
            item = region.objects.find(page)
            mine = item is not None and item.file is file and item.written_back
            if item is None or not mine or not _has(region, page):
                clean.append(page)  # replaced after the fault that we were told of
                if len(clean) < MOST_CLEAN:
                    continue
                after = page + region.page
                break
            file_offset = item.file_offset + page - item.offset
            if run is None:
                run = _Run(file, page, 0, file_offset, set())
            if not run.extend(page, region.page, file_offset, dirty.writers(page)):
                break
        for page in clean:
            dirty.discard(page)
        if clean:
            self._journal.clean(region.id, clean)
        return run, after if run is None else run.offset + run.length

    async def _write(self, region: Region, run: _Run) -> bool:
        """Write it; False if it is to be looked at anew: protecting it took its time."""
        backing = region.backing
        if backing is None:
            return True
        dirty = pages_of(region).dirty
        end = run.offset + run.length
        pages = range(run.offset, end, region.page)
        protection.protect(pages_of(region), run.offset, end, run.writers)
        if pages_of(region).behind:
            await protection.settled(pages_of(region))
            return False
        for page in pages:
            dirty.discard(page)
        content = backing.read(run.offset, run.length)
        barrier("writeback.read")
        run.file.hold()
        dirty.writing[run.file] = (run.offset, end)
        try:
            await self._keep_mutexes(region, run)
            await self._threads.run(run.file.uid, partial(run.file.write, content, run.file_offset))
        except BaseException as error:
            for page in pages:
                item = region.objects.find(page)
                if item is not None and item.file is run.file:
                    dirty.add(page, run.file)
            if isinstance(error, OSError) and self._seldom.now(region.id):
                log.error(
                    "region %s: cannot write back to %s: %s",
                    region.label(),
                    run.file.label(),
                    error.strerror,
                )
            raise
        finally:
            del dirty.writing[run.file]
            run.file.let_go()
        barrier("writeback.written")
        # What was written to meanwhile is dirty again.
        self._journal.clean(region.id, [page for page in pages if page not in dirty])
        self._metrics.written_back.inc(run.length)
        return True

    async def _keep_mutexes(self, region: Region, run: _Run) -> None:
        """Let who holds robust mutexes in what has just been protected write there again.

        Looking begins after protecting: who takes one later has a fault, and is noticed.
        """
        start, end = region.start + run.offset, region.start + run.offset + run.length
        for window in list(run.writers):
            sharer = window.sharer
            found: set[int] = set()
            # Of another user's process it could wait for ever, whose own mutex it is.
            if sharer.pid and window.attached and window.far is None:
                with trio.move_on_after(LOOKING_SECONDS):
                    look = partial(_mutexes, sharer.pid, start, end, region.page)
                    found = await self._threads.run(sharer.uid, look)
            for page in found:
                self._leave_open(region, run.file, page - region.start, window)

    @staticmethod
    def _leave_open(region: Region, file: MappedFile, page: int, window: Window) -> None:
        pages, item = pages_of(region), region.objects.find(page)
        if item is None or item.file is not file or not item.written_back or not item.writable:
            return
        if window.attached and not pages.leaving.contains(page):
            pages.dirty.add(page, file, [window])
            protection.attempt(window.unprotect, page, page + region.page)

    async def sync(self, region: Region, start: int, end: int) -> None:
        """msync(MS_SYNC): flush, and have the files' data on their disks.  Raises OSError."""
        # Held, because somebody may unmap them meanwhile.
        files = await _mapped(region, start, end)
        try:
            await self.flush(region, start, end)
            for file in files:
                if file.may_write:
                    await self._sync_file(file)
        finally:
            for file in files:
                file.let_go()

    async def _sync_file(self, file: MappedFile) -> None:
        try:
            await self._threads.run(file.uid, file.sync)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system without fsync
                raise

    def release(self, region: Region) -> None:
        """Close the memory of a region that is gone, when all of it is written.

        Each file takes a moment to let go of.
        """
        many = region.state is State.GONE and len(region.objects) > AT_ONE_TIME
        if pages_of(region).dirty or many:
            self._released.append(region)
            self._wanted.set()
        else:
            region.close_memory()

    async def run(self, regions: Callable[[], Iterable[Region]]) -> None:
        """Write every few seconds, forever.  A file that hangs holds up nothing else."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            while True:
                with trio.move_on_after(INTERVAL):
                    await self._wanted.wait()
                self._wanted = trio.Event()
                breath = Breath()
                for region in list(regions()):
                    for file in pages_of(region).dirty.files():
                        if not file.flushing.locked():
                            self._begin_round(nursery, region, file)
                        await breath.take()
                while self._released:
                    nursery.start_soon(self._last, self._released.pop())

    def _begin_round(self, nursery: trio.Nursery, region: Region, file: MappedFile) -> None:
        """Have the file written, when its turn comes; a user has so many at one time."""
        rounds = self._rounds.setdefault(file.uid, _Rounds())
        rounds.waiting.setdefault(file, region)
        if rounds.at_work < ROUNDS:
            rounds.at_work += 1
            nursery.start_soon(self._work, file.uid, rounds)

    async def _work(self, uid: int, rounds: _Rounds) -> None:
        try:
            while rounds.waiting:
                file = next(iter(rounds.waiting))
                await self._round(rounds.waiting.pop(file), file)
        finally:
            rounds.at_work -= 1
            if not rounds.at_work and self._rounds.get(uid) is rounds:
                del self._rounds[uid]

    async def _round(self, region: Region, file: MappedFile) -> None:
        # Logged where it happened; tried again in the next round.
        try:
            await self._flush_file(region, file, 0, region.size)
        except OSError:
            self._metrics.writeback_errors.inc()

    async def _everything(self, region: Region) -> None:
        async with trio.open_nursery() as nursery:
            breath = Breath()
            by_user: dict[int, _Rounds] = {}
            dirty = pages_of(region).dirty
            for file in [*dirty.files(), *dirty.writing]:
                by_user.setdefault(file.uid, _Rounds()).waiting.setdefault(file, region)
                await breath.take()
            for uid, rounds in by_user.items():
                for _ in range(min(ROUNDS, len(rounds.waiting))):
                    rounds.at_work += 1
                    nursery.start_soon(self._work, uid, rounds)

    async def _last(self, region: Region) -> None:
        """A region that is gone has its memory until its files have what was written to it.

        But for a file that is lost: nothing will ever be written to that.
        """
        while True:
            await self._everything(region)
            dirty = pages_of(region).dirty
            if not dirty:
                break
            lost = dirty.lost
            if lost or self._seldom.now((region.id, "last")):
                log.error(
                    "region %s is gone with %d bytes that its files did not take%s",
                    region.label(),
                    len(dirty) * region.page,
                    ": nobody has these files any more" if lost else " yet: it is tried again",
                )
            if lost:
                break
            await trio.sleep(INTERVAL)
        await _let_files_go(region)
        if region.backing is not None:
            region.close_memory()

    async def finish(self, regions: Callable[[], Iterable[Region]]) -> None:
        """The daemon ends: write everything, as long as the files answer.

        What they do not take stays dirty, here and in the journal.
        """
        before = self._nursery
        with trio.move_on_after(LAST_SECONDS):
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for region in regions():
                    if pages_of(region).dirty or pages_of(region).dirty.writing:
                        nursery.start_soon(self._everything, region)
        self._nursery = before


def _mutexes(pid: int, start: int, end: int, page: int) -> set[int]:
    """The pages of [start, end) that have robust mutexes which a process holds; addresses."""
    return {at - at % page for at in robust.held(pid) if start <= at < end}


async def _let_files_go(region: Region) -> None:
    """As Region.close_memory does, and with pauses."""
    breath = Breath()
    while (past := region.objects.past(0, region.size, AT_ONE_TIME)) is not None:
        removed = region.objects.remove(0, past)
        for file in dict.fromkeys(item.file for item in removed if item.file is not None):
            if not region.objects.uses(file):
                file.let_go()
            await breath.take()
        await breath.take()


def _has(region: Region, page: int) -> bool:
    """Whether there is a page that a sharer may have written to."""
    backing, watch = region.backing, pages_of(region).watch
    if backing is None or not backing.holds(page):
        return False
    return watch is None or watch.put.contains(page) or backing.is_stashed(page)


async def _mapped(region: Region, start: int, end: int) -> list[MappedFile]:
    """The files in [start, end) that are mapped MAP_SHARED, each once, and held."""
    found: dict[MappedFile, None] = {}
    breath = Breath()
    try:
        while (item := region.objects.first(start, end)) is not None:
            if item.file is not None and item.written_back and item.file not in found:
                item.file.hold()
                found[item.file] = None
            start = item.end
            await breath.take()
    except BaseException:
        for file in found:
            file.let_go()
        raise
    return list(found)
