"""Precedence for a daemon that starts.

Everybody who touches an absent page or calls waits for it.  It needs half a second of
processor time, which takes half a minute beside 150 threads that never sleep, be they
anybody's.  So a daemon that may (CAP_SYS_NICE, or RLIMIT_NICE: setpriority(2)) starts at the
highest priority, and gives it back when it is ready: what it does for a user from then on
gets no more of the processors than a process of theirs would.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

_HIGHEST: Final = -20
_usual: int | None = None
"""The priority before, in this process and those that it has forked."""


def take_precedence() -> None:
    """Run at the highest priority, if that is allowed; so does what is started meanwhile."""
    global _usual  # noqa: PLW0603 - a process has one priority
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, _HIGHEST)
        _usual = before


def give_back() -> None:
    """Run at the priority that we were started with, in all threads: each has its own."""
    if _usual is None:
        return
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, int(thread), _usual)
