"""How others are spared: pauses, and calls that nobody interrupts.

The kernel holds locks of a chunk while it makes a huge page of it, and whoever touches the
chunk waits for them.  Who is to take a small part of a processor only, and loses it to others
in the middle of that, holds all of those up, the longer the busier the machine is.  So the
pauses come between the calls, and a call itself is to be over soon: `hurry`, `Haste`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

T = TypeVar("T")

_STAT: Final = Path("/proc/stat")
LOOK_SECONDS: Final = 0.2
"""How often it is looked at how busy the machine is, at most."""
LEFT_ALONE: Final = 0.25
"""Of an idle processor: so much is left for whoever wants to start something."""
SLOW_SECONDS: Final = 0.05
MOST_SHARE: Final = 0.25
MOST_OF_ALL: Final = 1 / 16
"""What others lose of the time of all processors is about what they lose of their throughput."""
MOST_SLOW: Final = 16
"""After so many users nobody's: one who has many numbers is slow once with each."""
MOST_VMAS: Final = 512
"""What 512 pages are looked for in: about SLOW_SECONDS."""


def moderate() -> float:
    """The share of one processor that is taken from a server under full load unless it is said."""
    return min(MOST_SHARE, MOST_OF_ALL * len(os.sched_getaffinity(0)))


class Haste:
    """Has a short call run to its end before anybody else has the processor.

    By SCHED_RR (sched(7)): `nice` counts only among those of the same session or cgroup, and
    a database has hundreds of sessions.  Not for what may take long: of memory that is mapped
    in very many places, or of a user whose memory has taken long before.
    """

    def __init__(self) -> None:
        self._slow: set[int | None] = set()

    def call(self, function: Callable[[], T], user: int | None, vmas: int) -> T:
        """Call it; it is about memory of `user` that so many VMAs map."""
        before = time.thread_time()
        may = user not in self._slow and len(self._slow) < MOST_SLOW and vmas <= MOST_VMAS
        hurries = may and _before_others()
        try:
            return function()
        finally:
            if hurries:
                os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
            if time.thread_time() - before > SLOW_SECONDS:
                self._slow.add(user)


def _before_others() -> bool:
    """Have this thread run before all that are not real-time; whether it does."""
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False  # whoever has started us has chosen
    try:
        # (Not RESET_ON_FORK: who has RLIMIT_RTPRIO alone could not take that back.)
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError:
        return False  # no CAP_SYS_NICE, or RestrictRealtime=
    return True


class Pace:
    """Pauses, so that no more than a share of a processor is taken from others.

    For what is worth it what nobody else wants is taken, too, up to all of one processor:
    huge pages are never cheaper than while a program fills its memory.
    """

    def __init__(self, share: float) -> None:
        """`share` of one processor, above 0 and up to 1."""
        self.share = share
        self.haste = Haste()
        self._may = share
        self._taken = 0.0
        self._since = time.monotonic()
        self._idle = _idle()

    def pause(self, taken: float, waited: float = 0.0, *, worth_it: bool = False) -> float:
        """How long to pause after what has taken so many seconds.

        `waited`: for how long it has had no processor meanwhile, if that is to count as pause.
        """
        self._taken += taken
        elapsed = time.monotonic() - self._since
        if elapsed >= LOOK_SECONDS:
            self._look(elapsed)
        share = self._may if worth_it else self.share
        return max(taken * (1 / share - 1) - waited, 0.0)

    def _look(self, elapsed: float) -> None:
        idle = _idle()
        own = min(self._taken / elapsed, 1.0)
        free = (idle - self._idle) / elapsed - LEFT_ALONE
        self._may = min(max(self.share, own + free), 1.0)
        self._taken, self._since, self._idle = 0.0, time.monotonic(), idle


def _idle() -> float:
    """For how long all processors together have had nothing to do (proc_stat(5), seconds)."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        with _STAT.open("rb") as file:
            words = file.readline().split()
        return (int(words[4]) + int(words[5])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def hurry() -> None:
    """Have this process run before others, if it may."""
    for thread in os.listdir("/proc/self/task"):  # each has its own, and one asks: patience.py
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, int(thread), -10)
