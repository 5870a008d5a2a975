"""Tells when processes end.

The end of a connection is not enough: a sharer may have leaked the descriptor to a
child (a raw clone() copies it) that lives on.  A pidfd becomes readable when its
process ends, once and for good.

All pidfds hang in one epoll set, which is itself one readable descriptor for trio:
one task for all sharers instead of one for each.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from typing import Final

import trio

AT_ONCE: Final = 16


class Deaths:
    """Calls back when a watched process has ended."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}

    def watch(self, pidfd: int, callback: Callable[[], None]) -> None:
        """Call `callback` once, from the trio thread, when the process ends."""
        self._epoll.register(pidfd, select.EPOLLIN)
        self._callbacks[pidfd] = callback

    def forget(self, pidfd: int) -> None:
        """Stop watching; must come before the pidfd is closed."""
        if self._callbacks.pop(pidfd, None) is not None:
            self._epoll.unregister(pidfd)

    async def run(self) -> None:
        """Deliver, forever."""
        while True:
            await trio.lowlevel.wait_readable(self._epoll)
            # A few at one time: thousands may end together.
            for pidfd, _ in self._epoll.poll(0, AT_ONCE):
                callback = self._callbacks[pidfd]
                self.forget(pidfd)
                callback()

    def close(self) -> None:
        """Release the epoll set; the pidfds stay their owners'."""
        self._epoll.close()


def has_ended(pidfd: int) -> bool:
    """Whether the process behind a pidfd is gone."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def started(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 if it is gone.

    With the pid it names one process for good: field 22 of /proc/PID/stat, counted
    from behind the name, which may hold anything (proc_pid_stat(5)).
    """
    fields = read_proc(pid, "stat").rpartition(")")[2].split()
    return int(fields[19]) if len(fields) > 19 else 0


def state(pid: int, thread: int | None = None) -> str:
    """The state of a process's first thread, or another one: one letter; "" if it is gone."""
    name = "stat" if thread is None else f"task/{thread}/stat"
    fields = read_proc(pid, name).rpartition(")")[2].split()
    return fields[0] if fields else ""


def process_of(thread: int) -> int:
    """The process that a thread is of; 0 if it is gone."""
    return int(_status(thread, "Tgid") or 0)


def user_of(pid: int) -> int | None:
    """A process's effective user, also if it is not dumpable; None if it is gone."""
    users = _status(pid, "Uid").split()
    return int(users[1]) if len(users) > 1 else None


def _status(pid: int, key: str) -> str:
    for line in read_proc(pid, "status").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return value
    return ""


def read_proc(pid: int, name: str) -> str:
    """A short text of /proc/PID, empty if the process is gone."""
    try:
        fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(fd, 4096).decode("utf-8", "backslashreplace")
    except OSError:
        return ""
    finally:
        os.close(fd)
