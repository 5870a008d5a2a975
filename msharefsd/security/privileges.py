"""The rights that each process of the daemon keeps once it is set up, and no more.

root's rights come in 41 pieces (capabilities(7)).  Those that are not needed while
serving go for good, out of the bounding set too, and no program that we start gets any
back (no_new_privs).  What setting up needs besides happens before: CAP_SYS_RESOURCE to
raise the descriptor limit, CAP_DAC_OVERRIDE to make a mountpoint in somebody's
directory.

The two packages that wrap these calls for Python, python-prctl and pyprctl, have had no
release since 2021, and it is four calls.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Final

from msharefsd.linux import syscalls

log = logging.getLogger(__name__)

_NUMBERS: Final = {
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_KILL": 5,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_NICE": 23,
}
"""linux/capability.h."""

FRONT: Final = {
    "CAP_SYS_ADMIN": "umount2(2) at the end",
    "CAP_KILL": "SIGKILL for a pager that hangs",
}
PAGER: Final = {
    "CAP_DAC_READ_SEARCH": "/proc/PID/task/TID/syscall is its process's user's alone",
    "CAP_KILL": "SIGSEGV and SIGBUS for sharers",
    "CAP_SYS_PTRACE": "that file too; pidfd_getfd(2)",
    "CAP_SYS_ADMIN": "/proc/PID/map_files; page frames in /proc/PID/pagemap",
    "CAP_SYS_NICE": "process_madvise(2)",
}

_CAP_SETPCAP: Final = 8


def mask(needed: Collection[str]) -> int:
    """Bit N for capability number N."""
    return sum(1 << _NUMBERS[name] for name in needed)


def drop(needed: Collection[str]) -> None:
    """Let go of everything else.  To be called while there is one thread only.

    Capabilities belong to a thread; those to come inherit what is left.
    """
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise RuntimeError(f"{threads} threads: the others would keep their capabilities")
    permitted, kept = syscalls.capabilities(), mask(needed)
    if permitted >> _CAP_SETPCAP & 1:
        for number in range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1):
            if not kept >> number & 1:
                syscalls.prctl(syscalls.PR_CAPBSET_DROP, number)
    syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_CLEAR_ALL)
    syscalls.set_capabilities(permitted & kept)
    if os.geteuid() == 0:
        # An ordinary user's daemon unmounts by fusermount3, which is set-user-ID.
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    log.debug("capabilities: %#x, were %#x", permitted & kept, permitted)
