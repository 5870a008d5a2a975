"""The threads of sharers: where one is that has faulted, and signals for it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal as signals
from enum import Enum
from functools import partial
from typing import Final

import trio

from msharefsd.linux import processes, syscalls
from msharefsd.paging.window import Window
from msharefsd.region.region import Sharer
from msharefsd.threads.pool import Threads as Pool

log = logging.getLogger(__name__)

_LOOKS: Final = 5


class Threads:
    """How we number the threads of sharers.

    A fault names its thread by a number of the process's own pid namespace.  Which number
    that is here tells only a look at each thread of the process, and a user decides how
    many there are.  So one look, in the one thread that a user has for that, tells of all
    of them; what it told is believed as long as that one thread still says so.
    """

    def __init__(self) -> None:
        self._pool = Pool(lambda _uid: 1)
        self._looks: dict[Window, trio.Event] = {}
        """Who is looked at just now."""

    def known(self, window: Window, number: int) -> int | None:
        """The thread, if that can be told at once.  Raises Unknown if it takes a look.

        None if it is no thread of that process: somebody else (a debugger) touches its
        memory.
        """
        pid = window.sharer.pid
        if len(_field(pid, pid, "NSpid").split()) <= 1:
            return number if os.path.exists(f"/proc/{pid}/task/{number}") else None
        thread = window.threads.get(number)
        if thread is None or _inner(pid, thread) != number:
            raise UnknownError
        return thread

    async def find(self, window: Window, number: int) -> int | None:
        """The thread, after a look if need be; None as in known()."""
        with contextlib.suppress(UnknownError):
            return self.known(window, number)
        for _ in range(2):  # the first may have begun before the thread did
            await self._look(window)
            with contextlib.suppress(UnknownError):
                return self.known(window, number)
        return None

    async def _look(self, window: Window) -> None:
        """Look, or wait for who does."""
        if (look := self._looks.get(window)) is not None:
            await look.wait()
            return
        self._looks[window] = trio.Event()
        try:
            sharer = window.sharer
            window.threads = await self._pool.run(sharer.uid, partial(_all, sharer.pid))
        finally:
            self._looks.pop(window).set()


class UnknownError(Exception):
    """It takes a look at all threads of the process."""


def _inner(pid: int, thread: int) -> int:
    """A thread's number in its own pid namespace; 0 if it is gone."""
    numbers = _field(pid, thread, "NSpid").split()
    return int(numbers[-1]) if numbers else 0


def _all(pid: int) -> dict[int, int]:
    """The threads of a process, as we number them, by their own numbers."""
    with contextlib.suppress(OSError):
        names = os.listdir(f"/proc/{pid}/task")
        return {_inner(pid, int(name)): int(name) for name in names}
    return {}


def _field(pid: int, thread: int, key: str) -> str:
    for line in processes.read_proc(pid, f"task/{thread}/status").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return value
    return ""


class Where(Enum):
    """Where a thread is whose fault has been read."""

    USER = "waits in a fault that its code made"
    SYSTEM_CALL = "waits in a fault that a system call made"
    ELSEWHERE = "does not wait"


def where(pid: int, thread: int | None) -> Where:
    """Where a thread is now, as Threads has found it.

    /proc/PID/task/TID/syscall begins with the call's number, with -1 outside of one, or
    is "running" (proc_pid_syscall(5)).  It takes the right to ptrace(2); without that
    right the thread is taken for being in user mode.

    A signal ends the wait for a fault that code made, and the thread comes back to it
    with a fault of its own: the one that we know is over, and a signal for it would
    hit whatever the thread does by then.
    """
    if thread is None:
        return Where.SYSTEM_CALL
    first = ""
    for _ in range(_LOOKS):  # it tells of a fault a moment before it sleeps
        first = processes.read_proc(pid, f"task/{thread}/syscall").split(" ")[0].strip()
        if first != "running":
            break
    if first == "running":
        return Where.ELSEWHERE
    return Where.SYSTEM_CALL if first.isdigit() else Where.USER


def may_signal(sharer: Sharer) -> bool:
    """Whether a sharer's user might send its process signals.

    We could send any process any signal.  But the faults come from whoever made the
    userfaultfd, and the process from whoever made the connection; that may be no
    process that we see, one that has ended, or a set-user-ID program by now.
    /proc/PID belongs to the process's effective user (proc(5)).
    """
    if sharer.pid <= 0:
        return False
    try:
        owner = os.stat(f"/proc/{sharer.pid}").st_uid
    except OSError:
        return False
    return sharer.uid in (0, owner) and not sharer.ended()


def signal(pid: int, thread: int, which: signals.Signals, address: int) -> None:
    """SIGSEGV or SIGBUS for the thread, at `address`.

    The kernel kills a process that blocks or ignores one of its own making; one
    that is sent would only wait, and the thread with it.
    """
    bit = 1 << (which - 1)
    masks = (_field(pid, thread, key).strip() for key in ("SigBlk", "SigIgn"))
    if any(int(mask or "0", 16) & bit for mask in masks):
        log.info("process %d does not take %s: killed", pid, which.name)
        kill(pid)
        return
    # An error means that it is gone.
    with contextlib.suppress(OSError):
        syscalls.signal_fault(pid, thread, which, address)


def kill(pid: int) -> None:
    """End a process that can be helped in no other way."""
    with contextlib.suppress(OSError):
        os.kill(pid, signals.SIGKILL)
