"""The threads of sharers: where one is that has faulted, and signals for it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal as signals
from enum import Enum
from typing import Final

from msharefsd.linux import processes, syscalls
from msharefsd.region.region import Sharer

log = logging.getLogger(__name__)

_LOOKS: Final = 5


def _thread(pid: int, number: int) -> int | None:
    """The thread that has `number` in its own pid namespace, as we number it.

    None if it is no thread of that process: somebody else (a debugger) touches its
    memory.
    """
    own = _field(pid, pid, "NSpid").split()
    if len(own) <= 1:
        return number if os.path.exists(f"/proc/{pid}/task/{number}") else None
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/task"):
            inner = _field(pid, int(name), "NSpid").split()
            if inner and inner[-1] == str(number):
                return int(name)
    return None


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


def where(pid: int, number: int) -> Where:
    """Where a thread is now.

    /proc/PID/task/TID/syscall begins with the call's number, with -1 outside of one, or
    is "running" (proc_pid_syscall(5)).  It takes the right to ptrace(2); without that
    right the thread is taken for being in user mode.

    A signal ends the wait for a fault that code made, and the thread comes back to it
    with a fault of its own: the one that we know is over, and a signal for it would
    hit whatever the thread does by then.
    """
    thread = _thread(pid, number)
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


def signal(pid: int, number: int, which: signals.Signals, address: int) -> None:
    """SIGSEGV or SIGBUS for the thread, at `address`.

    The kernel kills a process that blocks or ignores one of its own making; one
    that is sent would only wait, and the thread with it.
    """
    thread = _thread(pid, number) or pid
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
