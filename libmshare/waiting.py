"""Waiting so that signal handlers run meanwhile, and may end it.

Python runs handlers in the main thread, between two of its instructions.  So what may wait
long is done in slices, or, where it cannot be cut, by another thread.
"""

from __future__ import annotations

import _thread
import errno
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

from libmshare import errors

_T = TypeVar("_T")

SLICE: Final = 0.05
"""The longest wait in one piece, in seconds."""
PATIENCE: Final = 60.0
"""How long a call waits for others that are in a heap, which takes microseconds (seconds)."""


def until(call: Callable[[int], _T], timeout: float | None) -> _T:
    """Call with so many milliseconds to wait, until it neither times out nor is interrupted.

    `timeout` is in seconds.  Raises what the call does; Busy at the end.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        left = SLICE if deadline is None else min(SLICE, deadline - time.monotonic())
        try:
            return call(max(0, round(left * 1000)))
        except errors.MshareError as error:  # and nothing that a handler raises
            if error.errno not in (errno.ETIMEDOUT, errno.EINTR):
                raise
            if deadline is not None and time.monotonic() >= deadline:
                raise


class _Call:
    """A call that another thread makes."""

    def __init__(self, function: Callable[[], object], undo: Callable[[], object]) -> None:
        self._function = function
        self._undo = undo
        self._done = _thread.allocate_lock()
        self._done.acquire()
        self._fate: dict[str, str] = {}  # setdefault() is one step, whatever threads do
        self.result: list[object] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result.append(self._function())
        except BaseException as error:  # noqa: BLE001 - raised where it was called
            self.error = error
        if self._fate.setdefault("end", "done") != "done":
            self.result.clear()
            self._undo()
        self._done.release()

    def wait(self) -> None:
        try:
            self._done.acquire()  # handlers run, and what they raise comes from here
        except BaseException:
            if self._fate.setdefault("end", "left") == "done":
                self.result.clear()
                self._undo()
            raise


def interruptible(function: Callable[[], _T], undo: Callable[[], object] = lambda: None) -> _T:
    """What the function returns or raises; a signal handler may raise something before.

    In that case the call goes on by itself, and `undo` is called when it is over.
    """
    if threading.current_thread() is not threading.main_thread():
        return function()
    call = _Call(function, undo)
    try:
        _thread.start_new_thread(call.run, ())
    except RuntimeError:  # the interpreter ends, or there are too many
        return function()
    call.wait()
    if call.error is not None:
        raise call.error
    return call.result.pop()  # type: ignore[return-value] # what the function returned
