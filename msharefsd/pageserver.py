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

A fault in a hole is answered with UFFDIO_POISON: SIGBUS for code, EFAULT in a
system call.  Kernels before 6.6 cannot do that; there the thread is sent SIGBUS,
as UFFD_FEATURE_THREAD_ID names it.  So is a fault for which there is no memory;
that page is tried again once a second, because unlike a hole it is the region's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections import OrderedDict
from typing import Final

import trio

from msharefsd import kernel, uffd
from msharefsd.backing import HUGE_PAGE, ShmBacking
from msharefsd.capabilities import Capabilities
from msharefsd.metrics import Metrics
from msharefsd.objects import Object
from msharefsd.regions import Sharer
from msharefsd.seldom import Seldom
from msharefsd.uffd import Fault, Mode, Outcome

log = logging.getLogger(__name__)

SMALLEST_CHUNK: Final = 64 << 10
LARGEST_CHUNK: Final = HUGE_PAGE
STREAMS: Final = 16
MOST_STARVED: Final = 4096
MEND_INTERVAL: Final = 1.0


class Window:
    """How much to populate around a fault: more the longer a thread goes on upwards.

    Chunks are aligned to their size, so that they fill huge-page ranges.  A fault
    right behind a chunk doubles the next one; several threads each have their own
    run.  A fault anywhere else begins small: a program that touches one page here
    and one there must not be given memory that it never uses.
    """

    def __init__(self) -> None:
        self._runs: OrderedDict[int, int] = OrderedDict()

    def chunk(self, offset: int) -> tuple[int, int]:
        """Where to populate for a fault at `offset`: (start, length) in bytes."""
        length = min(self._runs.pop(offset, SMALLEST_CHUNK // 2) * 2, LARGEST_CHUNK)
        start = offset - offset % length
        self._runs[start + length] = length
        if len(self._runs) > STREAMS:
            self._runs.popitem(last=False)
        return start, length


class PageServer:
    """Serves the faults of all sharers of one daemon."""

    def __init__(
        self, capabilities: Capabilities, metrics: Metrics, region_memory: int | None
    ) -> None:
        """`region_memory`: the most bytes a region may hold, or None."""
        self._capabilities = capabilities
        self._metrics = metrics
        self._region_memory = region_memory
        self._starving: set[Sharer] = set()
        self._starvation = trio.Event()
        self._seldom = Seldom()

    def adopt(self, fd: int) -> None:
        """Take a sharer's new userfaultfd: handshake, and never block on it.

        Raises OSError if it is none or was used before.
        """
        uffd.handshake(fd, self._capabilities.features)
        # Read without data a blocking one would stop the daemon.
        os.set_blocking(fd, False)

    async def serve(self, sharer: Sharer) -> None:
        """Answer a sharer's faults until its address space is gone or we are cancelled."""
        window = Window()
        try:
            while True:
                await trio.lowlevel.wait_readable(sharer.uffd)
                for fault in uffd.read_faults(sharer.uffd):
                    if self._answer(sharer, window, fault) is Outcome.GONE:
                        return
        except OSError as error:
            # The descriptor misbehaves: only its own process suffers.
            log.warning("sharer %d: userfaultfd failed: %s", sharer.pid, error)
        finally:
            self.forget(sharer)

    def forget(self, sharer: Sharer) -> None:
        """A sharer is going: whoever waits there looks again (and finds no server)."""
        self._starving.discard(sharer)
        with contextlib.suppress(OSError):
            uffd.wake(sharer.uffd, sharer.region.start, sharer.region.size)

    def _answer(self, sharer: Sharer, window: Window, fault: Fault) -> Outcome:
        region = sharer.region
        page = fault.address - fault.address % kernel.PAGE
        offset = page - region.start
        if not 0 <= offset < region.size or region.backing is None:
            # Registered elsewhere by the sharer itself: not ours to fill.
            uffd.wake(sharer.uffd, page, kernel.PAGE)
            return Outcome.RETRY
        if fault.minor:  # a page that mend() had to register for that
            _, outcome = uffd.map_present(sharer.uffd, page, kernel.PAGE)
            uffd.wake(sharer.uffd, page, kernel.PAGE)
            return outcome
        found = region.objects.find(offset)
        if found is None:
            self._metrics.faults.labels("hole").inc()
            self._metrics.sigbus.labels("hole").inc()
            return self._sigbus(sharer, page, fault.thread)
        self._metrics.faults.labels("anonymous").inc()
        outcome = self._populate(sharer, region.backing, window, found, offset)
        if outcome is Outcome.NO_MEMORY:
            self._metrics.sigbus.labels("no memory").inc()
            self._log_starvation(sharer)
            if len(sharer.starved) < MOST_STARVED:
                sharer.starved.add(offset)
                self._starving.add(sharer)
                self._starvation.set()
            return self._sigbus(sharer, page, fault.thread)
        if outcome is not Outcome.DONE:
            uffd.wake(sharer.uffd, page, kernel.PAGE)
        return outcome

    def _populate(
        self, sharer: Sharer, backing: ShmBacking, window: Window, found: Object, offset: int
    ) -> Outcome:
        """Populate the page at `offset`, and its chunk as far as the object and limits go."""
        start, length = window.chunk(offset)
        end = min(start + length, found.end)
        start = max(start, found.offset)
        if self._region_memory is not None:
            left = self._region_memory - backing.allocated()
            if left < kernel.PAGE:
                return Outcome.NO_MEMORY
            if left < end - start:
                start, end = offset, min(end, offset + left - left % kernel.PAGE)
        outcome = self._fill(sharer, backing, start, end)
        if outcome is Outcome.NO_MEMORY and (start, end) != (offset, offset + kernel.PAGE):
            # Not enough for the chunk; the page that somebody waits for may fit, or
            # have been filled before memory ran out.
            outcome = self._fill(sharer, backing, offset, offset + kernel.PAGE)
        return outcome

    def _fill(self, sharer: Sharer, backing: ShmBacking, start: int, end: int) -> Outcome:
        """Populate what is absent in [start, end); DONE when nothing is."""
        if not sharer.writable:
            try:
                backing.populate(start, end - start)
            except OSError as error:
                return uffd.outcome_of(error)
            self._metrics.populated.inc(end - start)
            uffd.wake(sharer.uffd, sharer.region.start + start, end - start)
            return Outcome.DONE
        woken = True
        base = sharer.region.start
        while start < end:
            done, outcome = uffd.zeropage(sharer.uffd, base + start, end - start)
            self._metrics.populated.inc(done)
            start += done
            if outcome is Outcome.PRESENT:
                # The backing may call a page absent that this sharer has something
                # for all the same (it mapped the window in a way of its own).
                start = max(backing.next_absent(start), start + kernel.PAGE)
                woken = False
            elif outcome is not Outcome.DONE and done == 0:
                return outcome
        # The kernel wakes who waits in a part that was populated, not who waits for
        # a page that turned out to be present.
        return Outcome.DONE if woken else Outcome.PRESENT

    def _sigbus(self, sharer: Sharer, page: int, thread: int) -> Outcome:
        if self._capabilities.poison:
            _, outcome = uffd.poison(sharer.uffd, page, kernel.PAGE)
            # PRESENT: poisoned or populated meanwhile.
            uffd.wake(sharer.uffd, page, kernel.PAGE)
            return outcome
        return self._signal(sharer, page, thread)

    def _signal(self, sharer: Sharer, page: int, thread: int) -> Outcome:
        """SIGBUS by hand.  A thread in user mode gets it instead of the page."""
        try:
            kernel.tgkill(sharer.pid, thread, signal.SIGBUS)
        except OSError:
            # The thread's number is one of its own pid namespace: tell the process.
            with contextlib.suppress(OSError):
                os.kill(sharer.pid, signal.SIGBUS)
        uffd.wake(sharer.uffd, page, kernel.PAGE)
        return Outcome.DONE

    def _log_starvation(self, sharer: Sharer) -> None:
        if self._seldom.now(sharer.region.id):
            log.error(
                "region %s: no memory for a fault of process %d: SIGBUS (the region holds %d "
                "bytes; see df /dev/shm and the daemon's limit)",
                sharer.region.label(),
                sharer.pid,
                sharer.region.allocated(),
            )

    async def mend(self) -> None:
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
        backing = sharer.region.backing
        for offset in sorted(sharer.starved):
            if backing is None or sharer.region.objects.find(offset) is None:
                sharer.starved.discard(offset)  # a hole now: the poison is right
                continue
            if self._region_memory is not None and (
                backing.allocated() + kernel.PAGE > self._region_memory
            ):
                return
            address = sharer.region.start + offset
            try:
                outcome = self._fill(sharer, backing, offset, offset + kernel.PAGE)
                if not sharer.writable and outcome is Outcome.DONE:
                    outcome = Outcome.PRESENT  # in the backing; the reader has the poison
                if outcome is Outcome.PRESENT and self._capabilities.map_present:
                    # Present by somebody else's touch: ZEROPAGE does not replace the
                    # poison then.  CONTINUE does, and needs MINOR mode.
                    uffd.register(sharer.uffd, address, kernel.PAGE, Mode.MISSING | Mode.MINOR)
                    _, outcome = uffd.map_present(sharer.uffd, address, kernel.PAGE)
            except OSError:
                outcome = Outcome.GONE
            if outcome is Outcome.NO_MEMORY:
                return
            sharer.starved.discard(offset)
