"""What takes its time to close is closed by a thread.

The last close of a file on a FUSE mount waits for that mount's daemon; freeing the
memory of a large region takes seconds.  Neither may hold up page faults.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable


class Disposal:
    """Runs what is given to it, one after the other, in a thread of its own."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closed = False
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while (function := self._queue.get()) is not None:
            with contextlib.suppress(OSError):
                function()

    def run(self, function: Callable[[], None]) -> None:
        """Run it soon; its OSError is nobody's."""
        if self._closed:
            with contextlib.suppress(OSError):
                function()
        else:
            self._queue.put(function)

    def close_fd(self, fd: int) -> None:
        """close(2), soon."""
        self.run(lambda: os.close(fd))

    def close(self) -> None:
        """From now on everything is run at once, by who gives it."""
        self._closed = True
        self._queue.put(None)
