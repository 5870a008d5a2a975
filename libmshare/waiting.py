"""Waiting so that signal handlers run meanwhile, and may end it.

Python runs handlers in the main thread, between two of its instructions.  So what may wait
long is done in slices, or, where it cannot be cut, by another thread.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import errno
import threading
import time
import weakref
from collections.abc import Callable
from typing import Final, Protocol, TypeVar

from libmshare import errors

_T = TypeVar("_T")

SLICE: Final = 0.05
"""The longest wait in one piece, in seconds."""
_SLICE_MS: Final = round(SLICE * 1000)
_UNDOING: Final = 0.5
"""How long a handler's error waits until what it ended is undone (seconds)."""
_LONG: Final = 60_000
"""As long as need be, in milliseconds."""
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


class _Interpreter:
    """Whether threads can be started: not when it ends."""

    ends = False


def _end() -> None:
    _Interpreter.ends = True


atexit.register(_end)


class _Call:
    """A call that another thread makes."""

    def __init__(self, function: Callable[[], object], undo: Callable[[], object]) -> None:
        self._function: Callable[[], object] | None = function
        self._undo = undo
        self._done = _thread.allocate_lock()
        self._done.acquire()
        self._fate: dict[str, str] = {}  # setdefault() is one step, whatever threads do
        self.result: list[object] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        assert self._function is not None
        try:
            self.result.append(self._function())
        except BaseException as error:  # noqa: BLE001 - raised where it was called
            self.error = error
        if self._fate.setdefault("end", "done") != "done":
            self._give_up()
        self._function = None  # and what it keeps
        self._done.release()

    def _give_up(self) -> None:
        if self.error is None:
            self._undo()
        self.result.clear()

    def wait(self, timeout: float = -1) -> bool:
        """Whether it is over, after so many seconds at most; handlers run, and may raise."""
        try:
            return self._done.acquire(timeout=timeout)
        except BaseException:
            if self._fate.setdefault("end", "left") == "done":
                self._give_up()
            else:
                self._done.acquire(timeout=_UNDOING)
            raise


def _start(function: Callable[[], object], undo: Callable[[], object]) -> _Call | None:
    """Have another thread call it; None if this one may do so itself."""
    if _Interpreter.ends or threading.current_thread() is not threading.main_thread():
        return None
    call = _Call(function, undo)
    try:
        _thread.start_new_thread(call.run, ())
    except RuntimeError:  # there are too many
        return None
    return call


def interruptible(function: Callable[[], _T], undo: Callable[[], object] = lambda: None) -> _T:
    """What the function returns or raises; a signal handler may raise something before.

    In that case the call is undone, by itself if that takes long.
    """
    call = _start(function, undo)
    if call is None:
        return function()
    del function, undo  # what raises below keeps this frame, and must not keep what they do
    call.wait()
    if call.error is not None:
        try:
            raise call.error
        finally:
            call.error = None  # or the thread, until it has ended, keeps what its frames had
    return call.result.pop()  # type: ignore[return-value] # what the function returned


def aside(function: Callable[[], object]) -> None:
    """Have it called, and wait for nothing.  What it raises is lost."""
    if _start(function, lambda: None) is None:
        function()


# -- calls of the C library --


class Call(Protocol):
    """One, which a thread of the library makes: core.Apart.  That costs less than one of ours."""

    @property
    def result(self) -> int:
        """0 if it has succeeded."""

    @property
    def has_begun(self) -> bool:
        """Whether it runs, or did."""

    def make(self) -> None:
        """Make it here."""

    def begin(self) -> bool:
        """Have it made; False if there is no thread for it."""

    def wait(self, milliseconds: int) -> bool:
        """Whether it is over, after so long at most; sooner if a signal has come."""


class _Waiter:
    """Lives as long as somebody waits for a call."""

    __slots__ = ("__weakref__",)


class _Running(weakref.ref[_Waiter]):
    """A call, what undoes it, and what must live as long as it runs.

    Whatever ends its waiter, between whichever two instructions: it is taken care of.
    """

    __slots__ = ("call", "keeps", "over", "undo")
    call: Call
    keeps: object
    over: _thread.LockType
    """Released when what nobody waits for is undone."""
    undo: Callable[[], object]

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


_running: dict[int, _Running] = {}


def _left(running: _Running) -> None:
    """Its waiter is gone; unless that was told of the end, somebody else has to wait."""
    if _running.pop(id(running), None) is None:
        return
    if running.call.has_begun:
        with contextlib.suppress(RuntimeError):  # the interpreter ends
            _thread.start_new_thread(_finish, (running,))


def _finish(running: _Running) -> None:
    while not running.call.wait(_LONG):
        pass
    if running.call.result == 0:
        running.undo()
    running.keeps = None
    running.over.release()


def apart(
    call: Call,
    undo: Callable[[], object],
    keeps: object,
    seconds: float | None = None,
) -> None:
    """Have the call made; a signal handler may raise something before it is over.

    In that case it is undone, by itself if that takes long.  `keeps` is kept until it is over.
    After so many `seconds` nobody waits any more, as if something had been raised.
    """
    if _Interpreter.ends or threading.current_thread() is not threading.main_thread():
        call.make()
        return
    waiter, running = _Waiter(), None
    try:
        running = _Running(waiter, _left)
        running.call, running.undo, running.keeps = call, undo, keeps
        running.over = _thread.allocate_lock()
        running.over.acquire()
        _running[id(running)] = running
        if call.begin():
            deadline = None if seconds is None else time.monotonic() + seconds
            while not call.wait(_SLICE_MS):
                if deadline is not None and time.monotonic() > deadline:
                    return
            _running.pop(id(running), None)
        else:
            _running.pop(id(running), None)
            call.make()
    except BaseException:
        # Now, and not when the last has died that keeps this frame: the traceback does.
        del waiter
        if running is not None and call.has_begun:
            running.over.acquire(timeout=_UNDOING)
        raise
