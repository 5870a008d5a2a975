"""The page server: decides what the page faults of sharers come to.

One task a sharer reads its userfaultfd.  MISSING mode on a shared mapping fires
only while a page is absent from the backing, so each page of a region costs one
fault in all, whoever touches it first; every later one is the kernel's business.

A fault walks down, and each step says what came of it; here alone all of them are
known:

    event -> which object, and is it allowed?       here
          -> how much, and from where?              populate.py, fills.py for files
          -> put it, into whom?                     populate.py
          -> wake, or say no                        poison.py, violation.py, hunger.py

A fault in a hole is answered with UFFDIO_POISON: SIGBUS for code, EFAULT in a
system call.  Kernels before 6.6 cannot do that; there the thread is sent SIGBUS,
as UFFD_FEATURE_THREAD_ID names it.  So is a fault for which there is no memory.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final

import trio

from msharefsd.barriers import barrier
from msharefsd.errors import Refused
from msharefsd.journal.journal import Journal
from msharefsd.linux import uffd
from msharefsd.linux.features import Capabilities
from msharefsd.linux.syscalls import HUGE_PAGE
from msharefsd.linux.uffd import Fault, Feature, Inherited, Outcome
from msharefsd.paging import thread
from msharefsd.paging.background import AGAIN_SECONDS, Background
from msharefsd.paging.bringers import Bringers
from msharefsd.paging.eager import Eager
from msharefsd.paging.fills import READ_AHEAD, Fills, Read
from msharefsd.paging.fresh import Fresh
from msharefsd.paging.hunger import Hunger
from msharefsd.paging.lanes import Far, Lanes
from msharefsd.paging.pages import Pages, Waiting, pages_of
from msharefsd.paging.poison import Poison
from msharefsd.paging.populate import Populate
from msharefsd.paging.violation import Violations
from msharefsd.paging.watching import Watching
from msharefsd.paging.window import Window, window_of
from msharefsd.region.objects import Object
from msharefsd.region.region import Region, Sharer
from msharefsd.telemetry.metrics import Metrics
from msharefsd.telemetry.seldom import Seldom
from msharefsd.threads.breath import Breath
from msharefsd.threads.pool import Threads

log = logging.getLogger(__name__)


PATIENCE: Final = 8
"""How often in a row nothing is there to be read, until it is asked more seldom."""
LONG_WAIT: Final = 0.05
"""Who has something so seldom does not make us go round and round (seconds)."""
FIRST_PAUSE: Final = 0.001
LONGEST_PAUSE: Final = 0.5


Heir = Callable[[Sharer, int], None]


def _nobody(_sharer: Sharer, fd: int) -> None:
    os.close(fd)


async def _is_room(_sharer: Sharer) -> None:
    pass


class PageServer:
    """Serves the faults of all sharers of one daemon."""

    def __init__(
        self,
        capabilities: Capabilities,
        metrics: Metrics,
        region_memory: int | None,
        threads: Threads,
        journal: Journal,
        owner: int | None = None,
    ) -> None:
        """`region_memory`: the most bytes a region may hold, or None.

        `owner`: whose regions they are; None if there is nobody else.
        """
        self._capabilities = capabilities
        self._metrics = metrics
        self._journal = journal
        self.inherited: Heir = _nobody
        """Told of a child that has a sharer's window, and its userfaultfd, which it takes."""
        self.room: Callable[[Sharer], Awaitable[None]] = _is_room
        """Waits until a sharer's user may have more of them."""
        self._since, self._later = 0.0, False
        """When the fault that is being answered was read; whether it is answered later."""
        self._reader = uffd.Reader(nowait=capabilities.nowait)
        self._seldom = Seldom()
        self._background = Background()
        far_reader = uffd.Reader(nowait=capabilities.nowait, may_wait=True)
        self.lanes = Lanes(owner, far_reader, self._background, self.give_up)
        self.fresh = Fresh()
        self.populate = Populate(metrics, self.fresh, region_memory)
        self._hunger = Hunger()
        self.fills = Fills(
            threads, self.populate, self._background, self._settled, self._not_settled
        )
        self.poison = Poison(capabilities, journal, self.populate, self.fills, self._hunger)
        self._violations = Violations(capabilities, self.poison, self._background)
        self.bringers = Bringers()
        self.watching = Watching(
            capabilities, journal, metrics, threads, self._background, region_memory
        )

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Everything that outlives a single fault; forever."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._background.run)
            nursery.start_soon(self._hunger.run, self.poison.repair)
            nursery.start_soon(self.watching.run)
            nursery.start_soon(self.bringers.run)
            task_status.started()

    # -- sharers --

    def adopt(self, fd: int) -> None:
        """Take a sharer's new userfaultfd: handshake, and never block on it.

        Raises OSError if it is none or was used before.
        """
        uffd.check_kind(fd)
        uffd.handshake(fd, self._capabilities.features)
        # A blocking one cannot be polled; see uffd.Reader for reading.
        os.set_blocking(fd, False)

    def adopt_far(self, fd: int, uid: int) -> Far:
        """The same of a process of another user than the owner, by its lane.

        It is closed, and the lane's handshake is under way: Far.greeted().  Raises OSError,
        and then it is not closed: EBUSY if the user's processes hold up calls on them.
        """
        far = self.lanes.take(uid, fd)
        # Without a child's: its userfaultfd would be in the lane's table.
        far.shake_hands(self._capabilities.features & ~Feature.EVENT_FORK)
        return far

    def give_up(self, sharer: Sharer) -> None:
        """A sharer's window cannot be brought to what its region is: it has to end."""
        if sharer.pidfd is not None and thread.may_signal(sharer):
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(sharer.pidfd, signal.SIGKILL)
        sharer.dismiss()

    async def serve(self, sharer: Sharer) -> None:
        """Answer a sharer's faults until its address space is gone or we are cancelled."""
        if sharer.region.backing is None:
            return
        window = window_of(sharer)
        window.served = True
        self._hunger.again(window)
        try:
            await self._serve(window)
        except OSError as error:
            # The descriptor misbehaves: only its own process suffers.
            if self._seldom.now(("userfaultfd", sharer.uid)):
                log.warning("sharer %d: userfaultfd failed: %s", sharer.pid, error)
        finally:
            self._forget(window)

    async def _serve(self, window: Window) -> None:
        """Until it is gone, or detached, which may be at every await."""
        breath, empty, pause, eager = Breath(), 0, FIRST_PAUSE, Eager()
        while not window.detached:
            since = trio.current_time()
            faults = await window.faults(self._reader)
            if faults or trio.current_time() - since > LONG_WAIT:
                empty, pause = 0, FIRST_PAUSE
            elif not window.detached:
                # Its process has read them; or has made it one that blocks, and such a
                # one says always that there is something.
                window.unblock()
                empty += 1
                if empty > PATIENCE:
                    await trio.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
            while faults:
                if not await self._answered_all(window, faults, breath):
                    return
                faults = eager.look(partial(window.faults_now, self._reader))

    async def _answered_all(
        self, window: Window, faults: Sequence[Fault | Inherited], breath: Breath
    ) -> bool:
        """Whether the window is there still."""
        # First, and without an await: a child's userfaultfd is nobody's else.
        children = [each for each in faults if isinstance(each, Inherited)]
        for child in children:
            self.inherited(window.sharer, child.uffd)
        if children:
            await self.room(window.sharer)
        read = time.perf_counter()
        for fault in faults:
            if not isinstance(fault, Inherited) and (
                self._answered(window, fault, read) is Outcome.GONE
            ):
                return False
            await breath.take()
            if window.detached:
                return False
        return True

    def _answered(self, window: Window, fault: Fault, since: float) -> Outcome:
        """`since`: when it was read (time.perf_counter())."""
        barrier("fault.read")
        self._since, self._later = since, False
        try:
            outcome = self._answer(window, fault)
        except OSError as error:
            outcome = self._failed(window, window.page_of(fault.address), error)
        if not self._later:
            self._metrics.service.observe("memory", time.perf_counter() - since)
        return outcome

    def _count(self, region: Region, kind: str) -> None:
        self._metrics.count_fault(kind)
        region.counts.faults += 1

    def _wait(self, window: Window, offset: int, fault: Fault) -> Waiting:
        """For a file: it is answered later."""
        self._later = True
        return Waiting(window, offset, fault, since=self._since)

    def _failed(self, window: Window, offset: int, error: OSError) -> Outcome:
        """A fault that cannot be answered ends in SIGBUS, and not in waiting forever."""
        if error.errno == errno.ESRCH:
            return Outcome.GONE
        region = window.region
        if self._seldom.now(("failed", region.id)):
            log.error(
                "region %s: a fault of process %d: %s",
                region.label(),
                window.sharer.pid,
                error.strerror,
            )
        return self.poison.fleeting(window, offset)

    def _forget(self, window: Window) -> None:
        """A sharer is going: whoever waits there looks again (and finds no server)."""
        self._hunger.forget(window)
        pages_of(window.region).awaiting.forget(window)
        if window.detached:
            return
        with contextlib.suppress(OSError):
            window.wake(0, window.size)

    def close(self, sharer: Sharer) -> None:
        """A sharer is being detached: let go of its userfaultfd."""
        window = window_of(sharer)
        self._forget(window)
        self.poison.marks.forget(window)
        sharer.pidfd = None
        sharer.paging = None  # nothing that refers to itself stays: see starter.py
        if window.far is not None:
            window.far.close()
            return
        trio.lowlevel.notify_closing(sharer.uffd)
        os.close(sharer.uffd)
        # The number may be another file's in a moment, one of our own mount even, and
        # an ioctl on that would wait for ourselves.
        sharer.uffd = -1

    def check_memory(self, region: Region) -> None:
        """Raise Refused(EDQUOT) if a region has more than its limits, by a donor's writing."""
        self.populate.check_memory(region)

    def starve(self, window: Window, start: int, end: int) -> None:
        """What is poisoned there, and an object's, is to be populated when it can be."""
        self._hunger.notice(window, start, end)

    # -- what a fault is --

    def _answer(self, window: Window, fault: Fault) -> Outcome:
        region = window.region
        offset = window.page_of(fault.address)
        if not 0 <= offset < region.size or region.backing is None:
            # The sharer registered or moved something else with our userfaultfd.
            return self.poison.fleeting(window, offset)
        pages = pages_of(region)
        if pages.leaving and pages.leaving.contains(offset):
            pages.held = self._later = True  # to be woken by who changes it
            return Outcome.DONE
        found = region.objects.find(offset)
        if fault.protected:
            return self._write_fault(window, found, offset, fault)
        if pages.watch is not None:
            self.watching.notice(region)
        if fault.minor:
            return self._present(window, pages, fault, found, offset)
        return self._missing(window, fault, found, offset)

    def _present(
        self, window: Window, pages: Pages, fault: Fault, found: Object | None, offset: int
    ) -> Outcome:
        """A touch of a page that is there and not in this window: it comes there, if it may.

        Registered for that are pages that had to be (poison.py), and what is watched.
        """
        start, end = offset, offset + window.region.page
        watch = pages.watch
        if watch is not None and watch.judging:
            if found is None or not watch.belongs(found, offset):
                watch.clean(start, end)
                return self._missing(window, fault, found, offset)
            first, length = window.chunks.chunk(offset)
            start, end = watch.around(found, offset, first, first + length)
        guarded = found is not None and found.guarded and window.writable
        page = window.region.page
        done, outcome = window.map_present(offset, end, protect=guarded)
        if not done and end > offset + page:  # it lies in several VMAs (ENOENT), say
            done, outcome = window.map_present(offset, offset + page, protect=guarded)
        if done and start < offset:
            # As far as it goes: some may be mapped already, or not be there.
            window.map_present(start, offset, protect=guarded)
        window.wake(offset, offset + page)
        if outcome is Outcome.STRANGE and not done:
            return self.poison.fleeting(window, offset)
        return outcome

    def _missing(self, window: Window, fault: Fault, found: Object | None, offset: int) -> Outcome:
        """A touch of a page that is absent."""
        if found is None:
            self._count(window.region, "hole")
            self._metrics.sigbus.labels("hole").inc()
            return self._violations.sigbus(window, offset, fault.thread)
        if not found.accessible or (fault.write and not found.writable):
            return self._forbidden(window, offset, fault)
        pages = pages_of(window.region)
        if pages.behind and found.guarded:
            # To be woken when it can be protected everywhere.
            pages.held_behind = self._later = True
            return Outcome.DONE
        if found.file is None:
            outcome = self._populated(window, window.chunks.chunk(offset), found, offset, fault)
            self._count(window.region, "anonymous")  # nobody has to wait for that
            return outcome
        self._count(window.region, "file")
        return self._of_a_file(window, fault, found, offset)

    def _of_a_file(self, window: Window, fault: Fault, found: Object, offset: int) -> Outcome:
        if found.awaited:
            return self._awaited(window, offset, fault)
        if self.fills.join(found, self._wait(window, offset, fault)):
            return Outcome.DONE
        chunk = window.chunks.chunk(offset, max(READ_AHEAD, window.region.page))
        return self._populated(window, chunk, found, offset, fault)

    def _awaited(self, window: Window, offset: int, fault: Fault) -> Outcome:
        """A touch of what is to be brought."""
        if self.bringers.waits(window, offset):
            self._later = True
            return Outcome.DONE
        self._metrics.sigbus.labels("awaited").inc()
        return self._violations.sigbus(window, offset, fault.thread)

    def _populated(
        self, window: Window, chunk: tuple[int, int], found: Object, offset: int, fault: Fault
    ) -> Outcome:
        """The page at `offset` of an object, and its chunk as far as it goes."""
        part = self.populate.part(window.region, found, chunk, offset)
        if part is None:
            if self.watching.relieve(window, offset):
                self._later = True
                return Outcome.DONE  # and is woken
            return self._no_memory(window, offset, fault.thread)
        if found.file is not None and not part.stashed:
            self.fills.read(found, part.start, part.end, self._wait(window, offset, fault))
            return Outcome.DONE
        outcome = self.populate.around(window, found, part, offset)
        if outcome is Outcome.NO_MEMORY:
            return self._no_memory(window, offset, fault.thread)
        if outcome is Outcome.STRANGE:
            return self.poison.fleeting(window, offset)
        if outcome is not Outcome.DONE:
            window.wake(offset, offset + window.region.page)
        return outcome

    def _write_fault(
        self, window: Window, found: Object | None, offset: int, fault: Fault
    ) -> Outcome:
        """A write to a page that is present and write-protected.

        Where that it goes to a file cannot be written down (a full disk) it waits: the next
        daemon would not know of it, and the file would never have it.
        """
        region, pages = window.region, pages_of(window.region)
        start, end = offset, offset + region.page
        if found is not None and not found.writable:
            return self._forbidden(window, offset, fault)
        if found is not None and found.file is not None and found.written_back:
            self._count(region, "dirty")
            if offset not in pages.dirty:
                try:
                    self._journal.add_dirty(region.id, offset)
                except Refused:
                    self._later = True
                    self._background.start(_look_again, window, offset)
                    return Outcome.DONE
                barrier("fault.dirty")
            pages.dirty.add(offset, found.file, [window])
        elif found is not None:
            # Left over from a protection that is gone: of the whole chunk at once.
            chunk = max(HUGE_PAGE, region.page)
            start = max(offset - offset % chunk, found.offset)
            end = min(offset - offset % chunk + chunk, found.end)
        try:
            window.unprotect(start, end)  # late, it is woken later as well
            outcome = Outcome.DONE
        except OSError:
            # Not every part of the range need be registered; this page is, or it had not faulted.
            outcome = _unprotected(window, offset, offset + region.page)
        window.wake(offset, offset + region.page)
        return outcome

    def _forbidden(self, window: Window, offset: int, fault: Fault) -> Outcome:
        self._count(window.region, "violation")
        return self._violations.forbidden(window, offset, fault)

    def _no_memory(self, window: Window, offset: int, thread: int | None) -> Outcome:
        self._metrics.sigbus.labels("no memory").inc()
        self._hunger.tell(window)
        outcome = self._violations.sigbus(window, offset, thread)
        if window.poisoned.contains(offset):
            self._hunger.notice(window, offset, offset + window.region.page)
        return outcome

    # -- what reading a file came to --

    def _settled(self, waiting: Waiting, read: Read) -> None:
        window, offset, fault = waiting.window, waiting.offset, waiting.fault
        self._served(waiting)
        match read:
            case Read.BEYOND:
                if fault is not None:
                    self._metrics.sigbus.labels("file").inc()
                    self._violations.beyond_the_end(window, offset, fault)
            case Read.NO_MEMORY:
                self._no_memory(window, offset, None)
                self._again(waiting)
            case Read.STRANGE:
                self.poison.fleeting(window, offset)
            case Read.STALE:
                self._again(waiting)
                window.wake(offset, offset + window.region.page)
            case Read.HERE | Read.IN_OTHERS:
                end = max(waiting.end, offset + window.region.page)
                self.poison.read(window, offset, end, by_others=read is Read.IN_OTHERS)
                if fault is None:  # who read it may have read less than that
                    self._again(waiting)
                window.wake(offset, offset + window.region.page)

    def _served(self, waiting: Waiting) -> None:
        if waiting.since:
            self._metrics.service.observe("file", time.perf_counter() - waiting.since)

    def _not_settled(self, waiting: Waiting, error: OSError) -> None:
        self._served(waiting)
        if waiting.fault is not None:
            self._failed(waiting.window, waiting.offset, error)
        else:
            self._again(waiting)

    def _again(self, waiting: Waiting) -> None:
        """Nobody asks where there is poison, so we have to."""
        window, start = waiting.window, waiting.offset
        end = max(waiting.end, start + window.region.page)
        for low, high in list(window.poisoned.within(start, end)):
            self._hunger.notice(window, low, high)


def _unprotected(window: Window, start: int, end: int) -> Outcome:
    try:
        window.unprotect(start, end)
    except OSError as error:
        return uffd.outcome_of(error)
    return Outcome.DONE


async def _look_again(window: Window, offset: int) -> None:
    """Have who waits for a page look again, in a while."""
    await trio.sleep(AGAIN_SECONDS)
    if window.attached:
        with contextlib.suppress(OSError):  # its process may be gone
            window.wake(offset, offset + window.region.page)
