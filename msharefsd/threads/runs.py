"""How long the one thread that serves everybody is one's alone.

While a task runs between two checkpoints, everybody else waits.  With
MSHAREFSD_MEASURE_RUNS=1 in its environment the daemon measures that, in processor time
of that thread (which does not depend on what else the machine does), and tells of each
run that was too long and longer than those before.  Tests have it on.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Final

import trio

log = logging.getLogger(__name__)

TOO_LONG_SECONDS: Final = 0.05


_over = False


def over() -> None:
    """Nobody is served any more: however long it takes to end, nobody waits for a turn."""
    global _over  # noqa: PLW0603 - a process ends once
    _over = True


class LongestRun(trio.abc.Instrument):
    """Measures it, from the first time on that the thread has nothing to do."""

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self._clock = clock
        self._serving = False
        self._since = clock()
        self.longest = 0.0
        """In seconds."""

    def before_io_wait(self, timeout: float) -> None:
        """Whoever is to be served can be, now: it has started."""
        self._serving = self._serving or timeout > 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002 - trio's signature
        """A run begins."""
        self._since = self._clock()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """It ends, and perhaps was too long."""
        took = self._clock() - self._since
        if not self._serving or took <= self.longest or _over or _is_the_end(task):
            return
        self.longest = took
        if took > TOO_LONG_SECONDS:
            log.error(
                "the longest run between two checkpoints took %.0f ms in task %s, which is at %s",
                took * 1000,
                task.name,
                _place(task),
            )


def _is_the_end(task: trio.lowlevel.Task) -> bool:
    """Whether the main task has ended: nobody is served any more."""
    above = task.parent_nursery.parent_task if task.parent_nursery else None
    main = above is not None and above.parent_nursery is None
    return main and next(task.iter_await_frames(), None) is None


def _place(task: trio.lowlevel.Task) -> str:
    """Where a task has stopped: functions of ours and their lines, innermost last."""
    frames = [
        f"{frame.f_code.co_name}:{line}"
        for frame, line in task.iter_await_frames()
        if "msharefsd" in frame.f_code.co_filename
    ]
    return " > ".join(frames[-4:]) or "its end"


def instruments() -> list[trio.abc.Instrument]:
    """What trio.run() is to be given."""
    return [LongestRun()] if os.environ.get("MSHAREFSD_MEASURE_RUNS") == "1" else []
