"""What takes its time to close is closed by a thread.

The last close of a file on a FUSE mount waits for that mount's daemon; freeing the
memory of a large region takes seconds.  Neither may hold up page faults.

A close that waits for a client's file may wait for ever, so each user has a thread of
their own for what they sent us; and the daemon one for what is its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from functools import partial

import trio

log = logging.getLogger(__name__)


class Disposal:
    """Runs what is given to it, one after the other for each user, in threads.

    A thread is given back when it has nothing more to do.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[int | None, deque[Callable[[], object]]] = {}
        """What is running comes first."""
        self._at_work: set[int | None] = set()
        self._closed = False

    def run(self, function: Callable[[], object], uid: int | None = None) -> None:
        """Run it soon; its OSError is nobody's.  `uid`: whose file it waits for, if any."""
        with self._lock:
            if not self._closed:
                self._waiting.setdefault(uid, deque()).append(function)
                self._start(uid)
                return
        # The process ends, and that closes what is a user's: nobody waits for it here.
        if uid is None:
            with contextlib.suppress(OSError):
                function()

    def _start(self, uid: int | None) -> None:
        if uid in self._at_work:
            return
        try:
            # One of those that have nothing to do, if there is one: a new one takes longer.
            trio.lowlevel.start_thread_soon(partial(self._work, uid), _over)
        except RuntimeError as error:  # out of threads: the next to come tries again
            log.error("cannot start a thread: %s", error)
        else:
            self._at_work.add(uid)

    def _work(self, uid: int | None) -> None:
        while True:
            with self._lock:
                function = self._waiting[uid][0]
            with contextlib.suppress(OSError):
                function()
            with self._lock:
                self._waiting[uid].popleft()
                if not self._waiting[uid]:
                    del self._waiting[uid]
                    self._at_work.discard(uid)
                    return

    def close_fd(self, fd: int, uid: int | None = None) -> None:
        """close(2), soon."""
        self.run(lambda: os.close(fd), uid)

    def close_fds(self, fds: list[int], uid: int | None = None) -> None:
        """As close_fd, of many."""

        def close() -> None:
            for fd in fds:
                with contextlib.suppress(OSError):
                    os.close(fd)

        if fds:
            self.run(close, uid)

    def pending(self, uid: int) -> int:
        """How many files of a user's wait to be closed."""
        with self._lock:
            return len(self._waiting.get(uid, ()))

    def close(self) -> None:
        """From now on everything is run at once, by who gives it."""
        with self._lock:
            self._closed = True


def _over(_: object) -> None:
    """Nobody waits for what a thread has come to."""
