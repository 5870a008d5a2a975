"""The page server: answers the page faults of sharers.

One task a sharer reads its userfaultfd.  MISSING mode on a shared mapping fires
only while a page is absent from the backing, so each page of a region costs one
fault in all, whoever touches it first; every later one is the kernel's business.

How a page is populated decides who pays for it (memory cgroups charge by the mm
that a page was populated through).  UFFDIO_ZEROPAGE into the faulting sharer
charges the sharer, as plain shared memory does, and maps the whole chunk there,
which saves a fault for each of its pages.  Through the host mapping the daemon
would pay: a container's limit would mean nothing, and the daemon would be the OOM
killer's first choice.  A reader's window is private, and zeros put there would be
its own: readers are served through the host mapping.

A page of a file is read in a thread and comes by UFFDIO_COPY, so that nobody ever
sees it before it is filled.  Read through the host mapping's descriptor or by
pointer it would be there empty first.  A reader's is copied into the host mapping.
Who reads a file from one end to the other has it read ahead of it, as a page cache
does, in pieces: one is read while another one is copied.

A fault in a hole is answered with UFFDIO_POISON: SIGBUS for code, EFAULT in a
system call.  Kernels before 6.6 cannot do that; there the thread is sent SIGBUS,
as UFFD_FEATURE_THREAD_ID names it.  So is a fault for which there is no memory;
that page is tried again once a second, because unlike a hole it is the region's.

A fault that the object's protection forbids is violation.py's.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from msharefsd.barriers import barrier
from msharefsd.errors import Refused
from msharefsd.journal.journal import Journal
from msharefsd.linux import syscalls, uffd
from msharefsd.linux.features import Capabilities
from msharefsd.linux.syscalls import HUGE_PAGE
from msharefsd.linux.uffd import Fault, Mode, Outcome
from msharefsd.memory.backing import Backing
from msharefsd.memory.buffers import BUFFER, Buffers, Zeros
from msharefsd.memory.files import MappedFile
from msharefsd.memory.shm import ShmObject
from msharefsd.paging import protection, violation
from msharefsd.region.objects import Object
from msharefsd.region.region import Region, Sharer
from msharefsd.telemetry.metrics import Metrics
from msharefsd.telemetry.seldom import Seldom
from msharefsd.threads.breath import Breath
from msharefsd.threads.pool import Threads

log = logging.getLogger(__name__)

STREAMS: Final = 16
READ_AHEAD: Final = 16 << 20
"""How much of a file is read for one fault at the most (bytes)."""
PIECES: Final = 2
"""How many pieces of that at one time: a file that hangs must not take all threads."""
MOST_POISONED: Final = 1 << 16
MEND_INTERVAL: Final = 1.0


_NOT_ALL: Final = frozenset({Outcome.NO_MEMORY, Outcome.RETRY, Outcome.STRANGE})
"""A chunk that could not be populated: perhaps the one page can."""
_LATER: Final = frozenset({Outcome.NO_MEMORY, Outcome.RETRY})
"""The marker is still there, and nobody faults where it is: we have to try again."""


async def _contained(function: Callable[..., Awaitable[object]], *arguments: object) -> None:
    """A defect in what one fault needs is not the end of all."""
    try:
        await function(*arguments)
    except Exception:
        log.exception("%s failed", getattr(function, "__name__", function))


class Window:
    """How much to populate around a fault: more the longer a thread goes on upwards.

    Chunks are aligned to their size, so that they fill huge-page ranges.  A fault
    right behind a chunk doubles the next one; several threads each have their own
    run.  A fault anywhere else begins small: a program that touches one page here
    and one there must not be given memory that it never uses.
    """

    def __init__(self, smallest: int, largest: int) -> None:
        """`smallest` and `largest` chunk, in bytes, powers of two."""
        self._smallest = smallest
        self._largest = largest
        self._runs: OrderedDict[int, int] = OrderedDict()

    def chunk(self, offset: int, largest: int | None = None) -> tuple[int, int]:
        """Where to populate for a fault at `offset`: (start, length) in bytes.

        `largest`: another one, for this time.
        """
        length = min(self._runs.pop(offset, self._smallest // 2) * 2, largest or self._largest)
        start = offset - offset % length
        self._runs[start + length] = length
        if len(self._runs) > STREAMS:
            self._runs.popitem(last=False)
        return start, length


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A sharer that wants a page, and the fault if a thread waits in one."""

    sharer: Sharer
    offset: int
    fault: Fault | None


@dataclass(eq=False, slots=True)
class _Fill:
    """A piece of a chunk that is being read from a file, and who waits for it."""

    file: MappedFile
    start: int
    end: int
    file_offset: int
    sharer: Sharer
    """Whose fault it was."""
    rest: Iterator[tuple[int, int]]
    """The further pieces of the chunk."""
    waiting: list[_Waiting] = field(default_factory=list)
    stale: bool = False
    """What it has read may be older than the call by which memory starts fresh."""


class PageServer:
    """Serves the faults of all sharers of one daemon."""

    def __init__(
        self,
        capabilities: Capabilities,
        metrics: Metrics,
        region_memory: int | None,
        threads: Threads,
        journal: Journal,
    ) -> None:
        """`region_memory`: the most bytes a region may hold, or None."""
        self._capabilities = capabilities
        self._metrics = metrics
        self._region_memory = region_memory
        self._threads = threads
        self._journal = journal
        self._buffers = Buffers()
        self._zeros = Zeros()
        self._fills: dict[int, list[_Fill]] = {}
        """By region id."""
        self._starving: set[Sharer] = set()
        self._starvation = trio.Event()
        self._reader = uffd.Reader(nowait=capabilities.nowait)
        self._seldom = Seldom()
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Everything that outlives a single fault; forever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await self._mend_forever()

    def _start(self, function: Callable[..., Awaitable[object]], *arguments: object) -> None:
        assert self._nursery is not None, "run() is not running"
        self._nursery.start_soon(_contained, function, *arguments)

    def adopt(self, fd: int) -> None:
        """Take a sharer's new userfaultfd: handshake, and never block on it.

        Raises OSError if it is none or was used before.
        """
        uffd.check_kind(fd)
        uffd.handshake(fd, self._capabilities.features)
        # A blocking one cannot be polled; see uffd.Reader for reading.
        os.set_blocking(fd, False)

    async def serve(self, sharer: Sharer) -> None:
        """Answer a sharer's faults until its address space is gone or we are cancelled."""
        region = sharer.region
        if region.backing is None:
            return
        window = Window(region.backing.smallest_chunk, region.backing.largest_chunk)
        if sharer.starved:
            self._starving.add(sharer)
            self._starvation.set()
        try:
            await self._serve(sharer, window)
        except OSError as error:
            # The descriptor misbehaves: only its own process suffers.
            if self._seldom.now(("userfaultfd", sharer.uid)):
                log.warning("sharer %d: userfaultfd failed: %s", sharer.pid, error)
        finally:
            self.forget(sharer)

    async def _serve(self, sharer: Sharer, window: Window) -> None:
        """Until it is gone, or detached, which may be at every await."""
        breath = Breath()
        while sharer.uffd >= 0:
            await trio.lowlevel.wait_readable(sharer.uffd)
            for fault in self._reader.faults(sharer.uffd) if sharer.uffd >= 0 else ():
                barrier("fault.read")
                try:
                    outcome = self._answer(sharer, window, fault)
                except OSError as error:
                    outcome = self._failed(sharer, fault, error)
                if outcome is Outcome.GONE:
                    return
                await breath.take()
                if sharer.uffd < 0:
                    return

    def _failed(self, sharer: Sharer, fault: Fault, error: OSError) -> Outcome:
        """A fault that cannot be answered ends in SIGBUS, and not in waiting forever."""
        if error.errno == errno.ESRCH:
            return Outcome.GONE
        if self._seldom.now(("failed", sharer.region.id)):
            log.error(
                "region %s: a fault of process %d: %s",
                sharer.region.label(),
                sharer.pid,
                error.strerror,
            )
        return self._poison(sharer, fault.address - fault.address % sharer.region.page)

    def forget(self, sharer: Sharer) -> None:
        """A sharer is going: whoever waits there looks again (and finds no server)."""
        self._starving.discard(sharer)
        if sharer.uffd < 0:
            return
        with contextlib.suppress(OSError):
            uffd.wake(sharer.uffd, sharer.region.start, sharer.region.size)

    def close(self, sharer: Sharer) -> None:
        """A sharer is being detached: let go of its userfaultfd."""
        self.forget(sharer)
        trio.lowlevel.notify_closing(sharer.uffd)
        os.close(sharer.uffd)
        # The number may be another file's in a moment, one of our own mount even, and
        # an ioctl on that would wait for ourselves.
        sharer.uffd = -1
        sharer.pidfd = None

    def starve(self, sharer: Sharer, offset: int) -> None:
        """A poisoned page of an object is to be populated as soon as there is memory."""
        sharer.starved.add(offset)
        self._starving.add(sharer)
        self._starvation.set()

    # -- what a fault is --

    def _answer(self, sharer: Sharer, window: Window, fault: Fault) -> Outcome:
        region = sharer.region
        page = fault.address - fault.address % region.page
        offset = page - region.start
        if not 0 <= offset < region.size or region.backing is None:
            # The sharer registered or moved something else with our userfaultfd.
            return self._poison(sharer, page)
        if region.leaving and region.leaving.contains(offset):
            region.held = True  # to be woken by who changes it
            return Outcome.DONE
        found = region.objects.find(offset)
        if fault.protected:
            return self._write_fault(sharer, found, offset, fault)
        if fault.minor:  # a page that had to be registered for that: see _remap
            guarded = found is not None and found.guarded and sharer.writable
            _, outcome = uffd.map_present(sharer.uffd, page, region.page, protect=guarded)
            uffd.wake(sharer.uffd, page, region.page)
            return outcome
        return self._missing(sharer, window, fault, found, offset)

    def _missing(
        self, sharer: Sharer, window: Window, fault: Fault, found: Object | None, offset: int
    ) -> Outcome:
        """A touch of a page that is absent."""
        if found is None:
            self._metrics.faults.labels("hole").inc()
            self._metrics.sigbus.labels("hole").inc()
            return self._sigbus(sharer, offset, fault.thread)
        if not found.accessible or (fault.write and not found.writable):
            return self._violation(sharer, offset, fault)
        self._metrics.faults.labels("file" if found.file else "anonymous").inc()
        if found.file is None:
            chunk = window.chunk(offset)
        elif self._join(found, _Waiting(sharer, offset, fault)):
            return Outcome.DONE
        else:
            chunk = window.chunk(offset, max(READ_AHEAD, sharer.region.page))
        return self._populate(sharer, chunk, found, offset, fault)

    def _write_fault(
        self, sharer: Sharer, found: Object | None, offset: int, fault: Fault
    ) -> Outcome:
        """A write to a page that is present and write-protected."""
        region = sharer.region
        start, end = offset, offset + region.page
        if found is not None and not found.writable:
            return self._violation(sharer, offset, fault)
        if found is not None and found.written_back:
            self._metrics.faults.labels("dirty").inc()
            if offset not in region.dirty:
                self._journal.add_dirty(region.id, offset)
                barrier("fault.dirty")
            region.dirty.setdefault(offset, set()).add(sharer)
        elif found is not None:
            # Left over from a protection that is gone: of the whole chunk at once.
            chunk = max(HUGE_PAGE, region.page)
            start = max(offset - offset % chunk, found.offset)
            end = min(offset - offset % chunk + chunk, found.end)
        try:
            uffd.write_unprotect(sharer.uffd, region.start + start, end - start)
        except OSError as error:
            uffd.wake(sharer.uffd, region.start + offset, region.page)
            return uffd.outcome_of(error)
        # Not every part of the range need be registered: at least it looks again.
        uffd.wake(sharer.uffd, region.start + offset, region.page)
        return Outcome.DONE

    def _violation(self, sharer: Sharer, offset: int, fault: Fault) -> Outcome:
        self._metrics.faults.labels("violation").inc()
        if not violation.may_signal(sharer):
            return self._poison(sharer, sharer.region.start + offset)
        where = violation.where(sharer.pid, fault.thread)
        if where is violation.Where.SYSTEM_CALL:
            self._start(self._fail_system_call, sharer, offset)
        elif where is violation.Where.USER:
            violation.signal(sharer.pid, fault.thread, signal.SIGSEGV, fault.address)
        else:
            uffd.wake(sharer.uffd, sharer.region.start + offset, sharer.region.page)
        return Outcome.DONE

    async def _fail_system_call(self, sharer: Sharer, offset: int) -> None:
        """Have a system call that touches what it may not fail with EFAULT.

        Nothing but an error of the page itself ends the kernel's own access, so the
        page is poisoned in this sharer until the call has met it.  What the page
        holds is in the stash meanwhile, from where anybody's touch brings it back.
        Another thread that has the right to read the page, and does in this
        moment, has SIGBUS: in the process with the defect, and in no other.
        """
        region = sharer.region
        async with region.change:
            if sharer.number not in region.sharers or region.backing is None:
                return
            found = region.objects.find(offset)
            page = region.start + offset
            if found is not None and found.writable:
                uffd.wake(sharer.uffd, page, region.page)  # allowed meanwhile
                return
            if not self._capabilities.poison:
                if violation.may_signal(sharer):
                    violation.kill(sharer.pid)  # it would try again for ever
                return
            try:
                if found is not None:
                    region.backing.stash_pages(offset, region.page)
                barrier("violation.stashed")
                with contextlib.suppress(OSError):
                    uffd.write_unprotect(sharer.uffd, page, region.page, wake=False)
                self._sigbus(sharer, offset, None)
                barrier("violation.poisoned")
                await trio.sleep(violation.SYSTEM_CALL_SECONDS)
                if sharer.number in region.sharers and region.backing is not None:
                    await self.clear_poison(region, offset, region.page)
            except OSError as error:
                log.warning("process %d: cannot fail a system call: %s", sharer.pid, error)

    # -- populating --

    def _populate(
        self,
        sharer: Sharer,
        chunk: tuple[int, int],
        found: Object,
        offset: int,
        fault: Fault,
    ) -> Outcome:
        """Populate the page at `offset`, and its chunk as far as the object and limits go."""
        region = sharer.region
        backing = region.backing
        assert backing is not None
        start, end = max(chunk[0], found.offset), min(chunk[0] + chunk[1], found.end)
        start, end, stashed = _of_one_source(backing, start, end, offset)
        if not stashed:  # what comes back from the stash is no more than there was
            start, end = self._within_limits(region, offset, start, end)
            if start == end:
                return self._starve(sharer, offset, fault.thread)
        if found.file is not None and not stashed:
            self._read_file(found, start, end, _Waiting(sharer, offset, fault))
            return Outcome.DONE
        source = backing.stash if stashed else None
        outcome = self._fill(sharer, found, start, end, source)
        whole = (start, end) == (offset, offset + backing.page)
        if outcome in _NOT_ALL and not whole:
            # Not enough memory for the chunk, or it lies in several VMAs; the page
            # that somebody waits for may be had.
            outcome = self._fill(sharer, found, offset, offset + backing.page, source)
        if outcome is Outcome.NO_MEMORY:
            return self._starve(sharer, offset, fault.thread)
        if outcome is Outcome.STRANGE:
            return self._poison(sharer, region.start + offset)
        if outcome is not Outcome.DONE:
            uffd.wake(sharer.uffd, region.start + offset, backing.page)
        return outcome

    def _room(self, region: Region, wanted: int) -> int:
        """How much of `wanted` bytes of memory the region may have more, by its limits.

        What is being read from files counts as if it were there.
        """
        reading = sum(fill.end - fill.start for fill in self._fills.get(region.id, ()))
        room = wanted + reading
        if self._region_memory is not None:
            room = min(room, self._region_memory - region.allocated())
        return max(0, region.account.room(max(0, room)) - reading)

    def _within_limits(self, region: Region, offset: int, start: int, end: int) -> tuple[int, int]:
        """As much of [start, end) as may be populated, the page at `offset` first."""
        left = self._room(region, end - start)
        if left < end - start:
            start, end = offset, min(end, offset + left - left % region.page)
        return start, end

    def check_memory(self, region: Region) -> None:
        """Raise Refused(EDQUOT) if a region has more than its limits, by a donor's writing."""
        if self._region_memory is not None and region.allocated() > self._region_memory:
            raise Refused(errno.EDQUOT, "more memory than region_memory of msharefsd allows")
        region.account.check_memory()

    def _fill(
        self, sharer: Sharer, found: Object, start: int, end: int, source: ShmObject | None
    ) -> Outcome:
        """Populate what is absent in [start, end), with zeros or from the stash."""
        if source is None:
            return self._put(sharer, start, end, None, guarded=found.guarded)
        buffer = self._buffers.take(end - start)
        try:
            got = os.preadv(source.fd, [buffer.view[: end - start]], start)
            end = start + got - got % sharer.region.page
            outcome = self._put(sharer, start, end, buffer.address, guarded=found.guarded)
            barrier("stash.copied")
            if outcome in (Outcome.DONE, Outcome.PRESENT):
                source.punch(start, end - start)
        finally:
            self._buffers.give_back(buffer)
        return outcome

    def _put(
        self, sharer: Sharer, start: int, end: int, address: int | None, *, guarded: bool
    ) -> Outcome:
        """Populate what is absent in [start, end) from `address`, or with zeros.

        Into the sharer if it pays; for a reader, and where nobody pays, into the host
        mapping.  DONE when nothing is absent and whoever waited there has been woken.
        """
        region = sharer.region
        backing = region.backing
        assert backing is not None
        try:
            if guarded:  # before anybody can see the pages
                protection.protect(region, start, end)
            host = None if sharer.writable and backing.charges_sharer else backing.host
            # UFFDIO_ZEROPAGE protects nothing, and hugetlb does not have it.
            if address is None and (guarded or not backing.charges_sharer):
                address = self._zeros.address(end - start)
        except OSError as error:
            return uffd.outcome_of(error)
        fd, base = (sharer.uffd, region.start) if host is None else (host.uffd, host.start)
        protected = guarded and host is None
        if host is None:
            for chunk in range(start - start % HUGE_PAGE, end, HUGE_PAGE):
                region.payers[chunk] = sharer.number
        outcome = self._put_absent(backing, (fd, base), start, end, address, protect=protected)
        if outcome not in (Outcome.DONE, Outcome.PRESENT):
            return outcome
        if host is not None:
            uffd.wake(sharer.uffd, region.start + start, end - start)
            return Outcome.DONE
        return outcome

    def _put_absent(
        self,
        backing: Backing,
        target: tuple[int, int],
        start: int,
        end: int,
        address: int | None,
        *,
        protect: bool,
    ) -> Outcome:
        """Populate what is absent in [start, end) in one address space.

        `target`: its userfaultfd, and where it has the region.  The kernel wakes who
        waits in a part that was populated, not who waits for a page that turned out
        to be present: PRESENT if there was one.
        """
        fd, base = target
        result = Outcome.DONE
        at = start
        while at < end:
            if address is None:
                done, outcome = uffd.zeropage(fd, base + at, end - at)
            else:
                source = address + at - start
                done, outcome = uffd.copy(fd, base + at, source, end - at, protect=protect)
            self._metrics.populated.inc(done)
            at += done
            if outcome is Outcome.PRESENT:
                # The backing may call a page absent that this sharer has something
                # for all the same (it mapped the window in a way of its own).
                if not backing.believes_present(at):
                    return Outcome.NO_MEMORY
                at = max(backing.next_absent(at), at + backing.page)
                result = outcome
            elif outcome is not Outcome.DONE and done == 0:
                return outcome
        return result

    # -- files --

    def _filling(self, region: Region, found: Object, offset: int) -> _Fill | None:
        """What reads the page at `offset` just now, if anything does."""
        for fill in self._fills.get(region.id, ()):
            inside = fill.start <= offset < fill.end
            if inside and fill.file is found.file and not fill.stale:
                return fill
        return None

    def read_anew(self, region: Region, start: int, end: int) -> None:
        """What is being read from files for [start, end) just now is not to be used."""
        for fill in self._fills.get(region.id, ()):
            if fill.start < end and start < fill.end:
                fill.stale = True

    def _join(self, found: Object, waiting: _Waiting) -> bool:
        """Wait for who reads the page just now; False if nobody does, or it is in the stash."""
        region = waiting.sharer.region
        fill = self._filling(region, found, waiting.offset)
        if fill is None or region.backing is None or region.backing.is_stashed(waiting.offset):
            return False
        fill.waiting.append(waiting)
        return True

    def _read_file(self, found: Object, start: int, end: int, waiting: _Waiting) -> None:
        """Have [start, end) read, the piece first that has the page somebody waits for."""
        if self._join(found, waiting):
            return
        region = waiting.sharer.region
        pieces = _pieces(max(BUFFER, region.page), waiting.offset, start, end)
        fill = self._start_fill(waiting.sharer, found, *next(pieces), pieces)
        fill.waiting.append(waiting)
        for _ in range(1, PIECES):
            self._read_ahead(region, fill)

    def _start_fill(
        self, sharer: Sharer, found: Object, start: int, end: int, rest: Iterator[tuple[int, int]]
    ) -> _Fill:
        assert found.file is not None
        file_offset = found.file_offset + start - found.offset
        fill = _Fill(found.file, start, end, file_offset, sharer, rest)
        self._fills.setdefault(sharer.region.id, []).append(fill)
        found.file.hold()
        self._start(self._run_fill, sharer.region, fill)
        return fill

    def _read_ahead(self, region: Region, before: _Fill) -> None:
        """Have the next piece read of what `before` is a piece of, if it is still wanted."""
        for start, end in before.rest:
            found = region.objects.find(start)
            if (
                region.backing is None
                or before.sharer.number not in region.sharers
                or found is None
                or found.file is not before.file
                or not found.accessible
                or region.leaving.contains(start)
                or self._room(region, end - start) < end - start
            ):
                return
            if region.backing.next_absent(start) < end and not self._filling(region, found, start):
                self._start_fill(before.sharer, found, start, min(end, found.end), before.rest)
                return

    async def _run_fill(self, region: Region, fill: _Fill) -> None:
        buffer = self._buffers.take(fill.end - fill.start)
        view = buffer.view[: fill.end - fill.start]
        try:
            usable = await self._threads.run(
                fill.file.uid, partial(fill.file.read, view, fill.file_offset, region.page)
            )
        except OSError as error:
            usable = 0
            if self._seldom.now((region.id, error.errno)):
                log.error(
                    "region %s: cannot read %s: %s",
                    region.label(),
                    os.fsdecode(fill.file.path),
                    error.strerror,
                )
        finally:
            fill.file.let_go()
            fills = self._fills[region.id]
            fills.remove(fill)
            if not fills:
                del self._fills[region.id]
        barrier("fill.read")
        # Nothing awaits from here on: what is true now stays true.
        try:
            if region.backing is not None:
                self._finish_fill(region, fill, buffer.address, usable)
        except OSError as error:
            for each in fill.waiting:
                if each.fault is not None and each.sharer.number in region.sharers:
                    self._failed(each.sharer, each.fault, error)
        else:
            if usable == fill.end - fill.start:
                self._read_ahead(region, fill)
        finally:
            self._buffers.give_back(buffer)

    def _drop_fill(self, region: Region, fill: _Fill) -> None:
        """What was read is not to be used: have who waits ask again."""
        for each in fill.waiting:
            sharer, offset = each.sharer, each.offset
            if sharer.number in region.sharers:
                if offset in sharer.poisoned:  # nobody asks there
                    self.starve(sharer, offset)
                uffd.wake(sharer.uffd, region.start + offset, region.page)

    def _finish_fill(self, region: Region, fill: _Fill, address: int, usable: int) -> None:
        if fill.stale:
            self._drop_fill(region, fill)
            return
        waiting = [each for each in fill.waiting if each.sharer.number in region.sharers]
        asked = (*(each.sharer for each in waiting), fill.sharer)
        sharers = [each for each in asked if each.number in region.sharers]
        target = next((each for each in sharers if each.writable), sharers[0] if sharers else None)
        backing = region.backing
        assert backing is not None
        present = {each.offset for each in waiting if backing.next_data(each.offset) == each.offset}
        outcome = Outcome.DONE
        # The objects may have changed while the file was read: put what was read only
        # where the same bytes of the same file still belong.
        for item in region.objects.within(fill.start, usable):
            same_place = item.file_offset - item.offset == fill.file_offset - fill.start
            right = item.file is fill.file and same_place and item.accessible
            if target is None or not right:
                continue
            for start, end in _not_stashed(backing, item.offset, item.end):
                outcome = self._put_read(
                    target, item, start, end, address + start - fill.start, waiting
                )
        for each in waiting:
            sharer, offset = each.sharer, each.offset
            found = region.objects.find(offset)
            if found is not None and found.file is fill.file and offset >= fill.start + usable:
                if each.fault is not None:
                    self._beyond_the_end(sharer, offset, each.fault)
            elif outcome is Outcome.NO_MEMORY and backing.next_data(offset) != offset:
                self._starve(sharer, offset, None)
            else:
                # Poison is right where there has been a hole meanwhile.
                if offset in sharer.poisoned and backing.next_data(offset) == offset:
                    self._mapped(
                        sharer, offset, by_others=sharer is not target or offset in present
                    )
                uffd.wake(sharer.uffd, region.start + offset, region.page)

    def _put_read(
        self,
        target: Sharer,
        item: Object,
        start: int,
        end: int,
        address: int,
        waiting: list[_Waiting],
    ) -> Outcome:
        outcome = self._put(target, start, end, address, guarded=item.guarded)
        if outcome in _NOT_ALL:
            # As in _populate: at least the pages that somebody waits for.
            for each in waiting:
                if start <= each.offset < end:
                    at = address + each.offset - start
                    last = each.offset + target.region.page
                    single = self._put(each.sharer, each.offset, last, at, guarded=item.guarded)
                    outcome = single if single is Outcome.NO_MEMORY else outcome
                    if single is Outcome.STRANGE:
                        self._poison(each.sharer, each.sharer.region.start + each.offset)
        return outcome

    def _beyond_the_end(self, sharer: Sharer, offset: int, fault: Fault) -> None:
        """A page that the file does not have, or does not give.

        Code has a signal and no poison: the file may grow.
        """
        self._metrics.sigbus.labels("file").inc()
        where = violation.where(sharer.pid, fault.thread)
        if where is violation.Where.SYSTEM_CALL:
            self._sigbus(sharer, offset, fault.thread)
        elif not violation.may_signal(sharer):
            self._poison(sharer, sharer.region.start + offset)
        elif where is violation.Where.USER:
            violation.signal(sharer.pid, fault.thread, signal.SIGBUS, fault.address)
        else:
            uffd.wake(sharer.uffd, sharer.region.start + offset, sharer.region.page)

    # -- SIGBUS --

    def _sigbus(self, sharer: Sharer, offset: int, thread: int | None) -> Outcome:
        page = sharer.region.start + offset
        if not self._capabilities.poison:
            return self._signal(sharer, page, thread)
        known = offset in sharer.poisoned or len(sharer.poisoned) < MOST_POISONED
        if known:
            self._journal.add_poisoned(sharer.number, offset)
        outcome = self._poison(sharer, page)
        if outcome is Outcome.PRESENT and self._forget_protection(sharer, offset):
            outcome = self._poison(sharer, page)
        if outcome is Outcome.DONE:
            if known:
                sharer.poisoned.add(offset)
                sharer.region.refused.add(sharer)
            elif self._seldom.now((sharer.region.id, "poisoned")):
                log.warning(
                    "process %d touches holes of region %s all over: some of them stay holes "
                    "for it whatever is mapped there",
                    sharer.pid,
                    sharer.region.label(),
                )
        return outcome

    def _poison(self, sharer: Sharer, page: int) -> Outcome:
        outcome = Outcome.RETRY
        if self._capabilities.poison:
            _, outcome = uffd.poison(sharer.uffd, page, sharer.region.page)
        # PRESENT: poisoned or populated meanwhile.
        uffd.wake(sharer.uffd, page, sharer.region.page)
        return outcome

    def _forget_protection(self, sharer: Sharer, offset: int) -> bool:
        """Take away a marker that write protection has left where no page is.

        A daemon that died between the two leaves one where it has freed a page, and
        poison does not replace it: the thread would try again for ever.  A page that
        comes is protected anew.
        """
        backing = sharer.region.backing
        if backing is None or backing.next_data(offset) == offset:
            return False
        with contextlib.suppress(OSError):  # not registered for it: no marker
            page = sharer.region.start + offset
            uffd.write_unprotect(sharer.uffd, page, backing.page, wake=False)
        return True

    def _signal(self, sharer: Sharer, page: int, thread: int | None) -> Outcome:
        """SIGBUS by hand.  A thread in user mode gets it instead of the page."""
        if violation.may_signal(sharer):
            try:
                if thread is None:
                    os.kill(sharer.pid, signal.SIGBUS)
                else:
                    syscalls.signal_fault(sharer.pid, thread, signal.SIGBUS, page)
            except OSError:
                # The thread's number is one of its own pid namespace: tell the process.
                with contextlib.suppress(OSError):
                    os.kill(sharer.pid, signal.SIGBUS)
        uffd.wake(sharer.uffd, page, sharer.region.page)
        return Outcome.DONE

    async def clear_poison(
        self, region: Region, offset: int, length: int, *, empty: bool = False
    ) -> None:
        """Make every sharer ask again for pages of objects in the range that raise SIGBUS.

        The kernel has no call for that; a page that comes into a sharer takes the
        marker's place.  Where nobody may touch anything one is put there and punched out
        again, and so in a range that is being mapped (`empty`): who has called mmap() may
        touch it when that returns, and a file may take its time.  Elsewhere it is the
        page itself.  In a hole SIGBUS is right, and others could see what is put there.

        The region may be gone when this returns.
        """
        end = offset + length
        breath = Breath()
        for sharer in list(region.refused):
            if len(sharer.poisoned) <= length // region.page:
                pages = [page for page in sharer.poisoned if offset <= page < end]
            else:
                some = range(offset, end, region.page)
                pages = [page for page in some if page in sharer.poisoned]
            for page in sorted(pages):
                await breath.take()
                if sharer.number not in region.sharers or region.backing is None:
                    break
                found = region.objects.find(page)
                if empty:
                    self._clear(sharer, page)
                elif found is not None and found.accessible:
                    self._repair(sharer, found, page)
                elif found is not None:
                    self._clear_hidden(sharer, found, page)
            if not sharer.poisoned:
                region.refused.discard(sharer)

    def _clear(self, sharer: Sharer, page: int, content: int | None = None) -> None:
        """Replace the marker by a page with that content, or zeros, and free it again."""
        backing = sharer.region.backing
        assert backing is not None
        outcome = self._put(sharer, page, page + backing.page, content, guarded=False)
        if outcome in _LATER:
            # Something may be mapped there in a moment: then the page is the region's.
            self.starve(sharer, page)
            return
        self._map(sharer, page, by_others=outcome is Outcome.PRESENT)
        barrier("poison.cleared")
        backing.punch(page, backing.page)  # at once: everybody sees what is there
        self._cleared(sharer, page)

    def _clear_hidden(self, sharer: Sharer, found: Object, page: int) -> None:
        """In an object that nobody may touch: what belongs there stays where it is.

        If we die before the page is freed, the next daemon takes it for the object's.  So
        it has what is in the stash, if anything is; and a page of a file that was not
        read yet is written down as one that is to go.
        """
        backing = sharer.region.backing
        assert backing is not None
        if backing.next_data(page) == page:  # populated by another, and not hidden yet
            self._mapped(sharer, page, by_others=True)
        elif backing.stash is not None and backing.is_stashed(page):
            buffer = self._buffers.take(backing.page)
            try:
                os.preadv(backing.stash.fd, [buffer.view[: backing.page]], page)
                self._clear(sharer, page, buffer.address)
            finally:
                self._buffers.give_back(buffer)
        else:
            if found.file is not None:
                try:
                    self._journal.add_clearing(sharer.region.id, page, backing.page)
                except Refused:
                    return  # a touch is SIGBUS then, and not SIGSEGV
            self._clear(sharer, page)

    def _repair(self, sharer: Sharer, found: Object, page: int) -> None:
        """Populate a poisoned page of an object in this sharer; or not, for want of memory."""
        backing = sharer.region.backing
        assert backing is not None
        if backing.next_data(page) == page:
            self._mapped(sharer, page, by_others=True)
            return
        stashed = backing.is_stashed(page)
        if not stashed and self._room(sharer.region, backing.page) < backing.page:
            self.starve(sharer, page)
            return
        if found.file is not None and not stashed:
            self._read_file(found, page, page + backing.page, _Waiting(sharer, page, None))
            return
        outcome = self._fill(
            sharer, found, page, page + backing.page, backing.stash if stashed else None
        )
        if outcome in _LATER:
            self.starve(sharer, page)
        else:
            self._mapped(sharer, page, by_others=outcome is Outcome.PRESENT)

    def _mapped(self, sharer: Sharer, offset: int, *, by_others: bool) -> None:
        """A poisoned page has been populated: see that the sharer has the page now.

        If it came into this very sharer, it has replaced the marker.  If not, only
        UFFDIO_CONTINUE replaces it, which takes MINOR mode.
        """
        self._map(sharer, offset, by_others=by_others)
        # Not before: nobody would know of the marker if we died in between.
        self._cleared(sharer, offset)

    def _cleared(self, sharer: Sharer, offset: int) -> None:
        if offset in sharer.poisoned:
            sharer.poisoned.discard(offset)
            self._journal.forget_poisoned(sharer.number, offset)
        sharer.starved.discard(offset)

    def _map(self, sharer: Sharer, offset: int, *, by_others: bool) -> None:
        region = sharer.region
        backing = region.backing
        assert backing is not None
        if sharer.writable:
            slot = backing.shared_slot(offset)
            if slot is not None and not any(True for _ in region.armed.within(*slot)):
                return  # what came into one page table came into all of them
            if not by_others and backing.charges_sharer:
                return
        if not self._capabilities.map_present:
            return
        address = region.start + offset
        found = region.objects.find(offset)
        # What nobody may touch is armed and protected when it is hidden.
        armed = sharer.writable and sharer.region.armed.contains(offset)
        guarded = found is not None and found.guarded and armed
        # Registering anew for MINOR takes away every mode that is not asked for again
        # (userfaultfd_register_range(), mm/userfaultfd.c).
        mode = Mode.MISSING | Mode.MINOR | (Mode.WP if armed else Mode(0))
        with contextlib.suppress(OSError):  # the window is gone, or the process
            uffd.register(sharer.uffd, address, backing.page, mode)
            uffd.map_present(sharer.uffd, address, backing.page, protect=guarded)

    # -- want of memory --

    def _starve(self, sharer: Sharer, offset: int, thread: int | None) -> Outcome:
        self._metrics.sigbus.labels("no memory").inc()
        self._log_starvation(sharer)
        outcome = self._sigbus(sharer, offset, thread)
        if offset in sharer.poisoned:
            self.starve(sharer, offset)
        return outcome

    def _log_starvation(self, sharer: Sharer) -> None:
        if self._seldom.now(sharer.region.id):
            log.error(
                "region %s: no memory for a fault of process %d: SIGBUS (the region holds %d "
                "bytes, user %d's regions %d; see df /dev/shm and the daemon's limits)",
                sharer.region.label(),
                sharer.pid,
                sharer.region.allocated(),
                sharer.region.uid,
                sharer.region.account.memory(),
            )

    async def _mend_forever(self) -> None:
        """Once a second try again to populate what was poisoned for want of memory."""
        while True:
            await self._starvation.wait()
            await trio.sleep(MEND_INTERVAL)
            for sharer in list(self._starving):
                self._mend(sharer)
                if not sharer.starved:
                    self._starving.discard(sharer)
            if not self._starving:
                self._starvation = trio.Event()

    def _mend(self, sharer: Sharer) -> None:
        region = sharer.region
        for offset in sorted(sharer.starved):
            found = region.objects.find(offset)
            if region.backing is None or found is None or not found.accessible:
                sharer.starved.discard(offset)  # the poison is right now
                continue
            self._repair(sharer, found, offset)
            if offset in sharer.starved:
                return


def _of_one_source(backing: Backing, start: int, end: int, offset: int) -> tuple[int, int, bool]:
    """The part of [start, end) around `offset` that comes from where that page comes from.

    And whether that is the stash.  What passes through a buffer fits in it.
    """
    if backing.stash is None:
        return start, end, False
    stashed = backing.is_stashed(offset)
    if stashed:
        start, end = next(_pieces(max(BUFFER, backing.page), offset, start, end))
        end = min(end, backing.stash.next_absent(offset))
    else:
        end = min(end, backing.stash.next_data(offset))
    if backing.stash.next_data(start) < offset:
        start = offset
    return start, end, stashed


def _pieces(length: int, offset: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """[start, end) from the piece on that `offset` is in; pieces are aligned to `length`."""
    for piece in range(offset - offset % length, end, length):
        yield max(piece, start), min(piece + length, end)


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
