"""What happens to a thread that touches what it may not, or what a file does not have.

The kernel's own answer is SIGSEGV for code and EFAULT for a system call, and it is
given here by other means: a signal to the thread, which leaves the fault to handle
it; and a page that is poisoned for a moment, because the kernel's own access to memory
goes on trying whatever signal comes, unless it kills.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Final

import trio

from msharefsd.barriers import barrier
from msharefsd.errors import Refused
from msharefsd.linux import syscalls
from msharefsd.linux.features import Capabilities
from msharefsd.linux.uffd import Fault, Outcome
from msharefsd.paging import protection, thread
from msharefsd.paging.background import AGAIN_SECONDS, Background
from msharefsd.paging.pages import pages_of
from msharefsd.paging.poison import Poison
from msharefsd.paging.thread import Threads, Where
from msharefsd.paging.window import Window
from msharefsd.telemetry.seldom import Seldom

log = logging.getLogger(__name__)

SYSTEM_CALL_SECONDS: Final = 0.002
"""How long a page is kept poisoned for a system call to meet it.  If it was not
scheduled in that time, it faults again."""


Answer = Callable[[int | None], None]
"""Given the thread, as Threads.known has it."""


class Violations:
    """Answers them."""

    def __init__(self, capabilities: Capabilities, poison: Poison, background: Background) -> None:
        self._capabilities = capabilities
        self._poison = poison
        self._background = background
        self._threads = Threads()
        self._seldom = Seldom()

    def forbidden(self, window: Window, offset: int, fault: Fault) -> Outcome:
        """A touch that the object's protection does not allow."""
        self._located(window, fault, partial(self._forbidden, window, offset, fault))
        return Outcome.DONE

    def beyond_the_end(self, window: Window, offset: int, fault: Fault) -> None:
        """A page that the file does not have, or does not give."""
        self._located(window, fault, partial(self._beyond, window, offset, fault))

    def _located(self, window: Window, fault: Fault, answer: Answer) -> None:
        """Have the answer given as soon as it is known which thread it is."""
        try:
            found = self._threads.known(window, fault.thread)
        except thread.UnknownError:
            self._background.start(self._locate, window, fault, answer)
        else:
            answer(found)

    async def _locate(self, window: Window, fault: Fault, answer: Answer) -> None:
        found = await self._threads.find(window, fault.thread)
        if window.attached and not window.detached:
            with contextlib.suppress(OSError):
                answer(found)

    def _forbidden(self, window: Window, offset: int, fault: Fault, found: int | None) -> None:
        sharer = window.sharer
        reachable = thread.may_signal(sharer)
        where = _where(window, found) if reachable else Where.SYSTEM_CALL
        if where is Where.SYSTEM_CALL:  # who cannot be sent a signal has SIGBUS of that
            self._background.start(self._fail_system_call, window, offset)
        elif where is Where.USER and found is not None:
            thread.signal(sharer.pid, found, signal.SIGSEGV, fault.address)
        else:
            window.wake(offset, offset + window.region.page)

    def _beyond(self, window: Window, offset: int, fault: Fault, found: int | None) -> None:
        # Code has a signal and no poison: the file may grow.
        sharer = window.sharer
        where = _where(window, found)
        if where is Where.SYSTEM_CALL:
            self.sigbus(window, offset, fault.thread)
        elif not thread.may_signal(sharer):
            self._poison.fleeting(window, offset)
        elif where is Where.USER and found is not None:
            thread.signal(sharer.pid, found, signal.SIGBUS, fault.address)
        else:
            window.wake(offset, offset + window.region.page)

    def sigbus(self, window: Window, offset: int, number: int | None) -> Outcome:
        """A page that there is not: by poison, and without it by hand."""
        if self._capabilities.poison:
            return self._poison.known(window, offset)
        return _signal(window, offset, number)

    async def _fail_system_call(self, window: Window, offset: int) -> None:
        """Have a system call that touches what it may not fail with EFAULT.

        Nothing but an error of the page itself ends the kernel's own access, so the
        page is poisoned in this sharer until the call has met it.  What the page
        holds is in the stash meanwhile, from where anybody's touch brings it back.
        Another thread that has the right to read the page, and does in this
        moment, has SIGBUS: in the process with the defect, and in no other.

        Where there is no room to move it (anybody can fill /dev/shm) the call waits for
        some.
        """
        if not window.writable:
            # Its window is its own: nobody else need wait, and nothing has to be moved.
            await self._refuse(window, offset)
            return
        while True:
            async with window.region.change:
                if await self._refuse(window, offset):
                    return
            await trio.sleep(AGAIN_SECONDS)

    async def _refuse(self, window: Window, offset: int) -> bool:
        """Whether that is done; False if there was no room."""
        region = window.region
        if window.writable:
            await protection.settled(pages_of(region))
        end = offset + region.page
        if not window.attached or region.backing is None:
            return True
        found = region.objects.find(offset)
        if found is not None and found.writable:
            window.wake(offset, end)  # allowed meanwhile
            return True
        if not self._capabilities.poison:
            if thread.may_signal(window.sharer):
                thread.kill(window.sharer.pid)  # it would try again for ever
            return True
        try:
            if found is not None and window.writable:
                pages_of(region).stash(offset, end)
        except (OSError, Refused) as error:
            self._complain(window, error)
            return False
        try:
            barrier("violation.stashed")
            with contextlib.suppress(OSError):
                window.unprotect(offset, end, wake=False)
            self._poison.known(window, offset)
            barrier("violation.poisoned")
            await trio.sleep(SYSTEM_CALL_SECONDS)
            if window.attached:
                self._poison.clear_page(window, offset)
        except OSError as error:
            self._complain(window, error)
        return True

    def _complain(self, window: Window, error: OSError | Refused) -> None:
        if self._seldom.now(window.region.id):
            log.warning("process %d: cannot fail a system call: %s", window.sharer.pid, error)


def _where(window: Window, found: int | None) -> Where:
    """As thread.where; that takes a lock which a process can hold while it executes another."""
    look = partial(thread.where, window.sharer.pid, found)
    if window.far is None:
        return look()
    return window.far.ask_now(look) or Where.ELSEWHERE


def _signal(window: Window, offset: int, number: int | None) -> Outcome:
    """SIGBUS by hand.  A thread in user mode gets it instead of the page."""
    sharer = window.sharer
    if thread.may_signal(sharer):
        try:
            if number is None:
                os.kill(sharer.pid, signal.SIGBUS)
            else:
                address = window.start + offset
                syscalls.signal_fault(sharer.pid, number, signal.SIGBUS, address)
        except OSError:
            # The thread's number is one of its own pid namespace: tell the process.
            with contextlib.suppress(OSError):
                os.kill(sharer.pid, signal.SIGBUS)
    window.wake(offset, offset + window.region.page)
    return Outcome.DONE
