"""Many things done by a few threads, while the caller's signal handlers run."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final, Generic, TypeVar

T = TypeVar("T")

Progress = Callable[[int, int], object]
"""Told how many bytes are done, and of how many."""

IN_FLIGHT: Final = 16
"""Parts that are on their way at one time: with 30 ms to the first byte and 100 MiB/s for each
connection fewer do not fill a link, and more take more memory."""
TICK: Final = 0.2
"""How often the caller is told how it goes, in seconds."""
_TIDY: Final = 2.0
"""How long a failure waits for what is on its way (seconds): a request may hang."""


class _Crew(Generic[T]):
    def __init__(self, items: Iterable[T], do: Callable[[T], object], width: int) -> None:
        self._items = iter(items)
        self._do = do
        self._lock = threading.Lock()
        self._failures: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._stop = False
        self._threads = [
            threading.Thread(target=self._work, name="mshare image", daemon=True)
            for _ in range(width)
        ]

    def _next(self) -> list[T]:
        with self._lock:
            return [] if self._stop else list(itertools.islice(self._items, 1))

    def _work(self) -> None:
        failure: BaseException | None = None
        try:
            while item := self._next():
                self._do(item[0])
                del item
        except BaseException as error:  # noqa: BLE001 - raised where it was asked for
            failure = error
        with self._lock:
            if not self._stop:
                self._failures.put(failure)
        failure = None  # or its traceback would keep this frame, and that it

    def run(self, tick: Callable[[], object]) -> None:
        left = len(self._threads)
        try:
            for thread in self._threads:
                thread.start()
            while left:
                try:
                    failure = self._failures.get(timeout=TICK)
                except queue.Empty:
                    tick()
                    continue
                left -= 1
                if failure is not None:
                    raise failure
        finally:
            failure = None  # as above
            with self._lock:
                self._stop = True
            with contextlib.suppress(queue.Empty):
                while True:
                    self._failures.get_nowait()  # which keeps what it was about
            deadline = time.monotonic() + _TIDY
            for thread in self._threads:
                if thread.is_alive():  # or it was not started, or not to the end
                    thread.join(max(0.0, deadline - time.monotonic()))
            self._threads.clear()  # what was not started keeps us
        tick()


def each(
    items: Iterable[T],
    do: Callable[[T], object],
    tick: Callable[[], object] = lambda: None,
    width: int = IN_FLIGHT,
) -> None:
    """Call `do` with each, in order, `width` at one time; `tick` here, again and again.

    The first failure is raised and ends it: no more of them begin.
    """
    _Crew(items, do, width).run(tick)
