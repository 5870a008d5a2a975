"""Calls on the mount, with a limit.

A daemon that does not answer holds a system call on its mount for ever, and a process
in such a call may ignore even SIGKILL (it waits in the kernel for FUSE's reply).  So
whatever touches the mount runs in a child: if that is not done in time, the child is
killed and left behind, and the command goes on to say so.  multiprocessing and
concurrent.futures wait for their children at exit, and would hang there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import select
import signal
import time
import traceback
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, Final, NoReturn, TypeVar

from libmshare.cli.errors import CommandError, NotAnsweringError

T = TypeVar("T")
P = TypeVar("P")

_ENDING: Final = 5.0
"""How long a child that is interrupted has to tidy up (seconds)."""


def bounded(function: Callable[[], T], seconds: float) -> T:
    """What `function` returns, or raises, in a child process that has `seconds` for it.

    Results travel by pickle.  Raises NotAnsweringError when the time is over; what the child
    was doing may then still be done when the daemon answers again.
    """
    child, receiving = begin(function)
    try:
        reply = _read(receiving, seconds)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(receiving)
    _, status = os.waitpid(child, 0)
    result: T = answer(reply, status)
    return result


def begin(function: Callable[[], object]) -> tuple[int, int]:
    """Call it in a child; returns that, and a pipe with what `answer` takes, to its end."""
    receiving, sending = os.pipe2(os.O_CLOEXEC)
    try:
        child = os.fork()
    except OSError:
        os.close(receiving)
        os.close(sending)
        raise
    if child == 0:
        _run(lambda _: function(), sending)
    os.close(sending)
    return child, receiving


def answer(reply: bytes, status: int) -> Any:
    """What the child's function has returned, or raises what it has raised.

    `status` is how the child has ended (waitpid(2)).
    """
    if not reply:
        ended = os.waitstatus_to_exitcode(status)
        raise CommandError(f"the process that asks the daemon ended with {ended}")
    done, value = pickle.loads(reply)  # noqa: S301 - from our own child
    if not done:
        raise value
    return value


def silent(seconds: float) -> NotAnsweringError:
    """For when the daemon had so long for its answer."""
    return NotAnsweringError(
        f"no answer from the daemon within {seconds:g} s; look for a msharefsd that is "
        "stopped or stuck"
    )


def followed(function: Callable[[Callable[[P], None]], T], heard: Callable[[P], object]) -> T:
    """As `bounded`, for what takes as long as it takes.

    What `function` tells, by the call that it is given, `heard` gets.  Who interrupts us
    interrupts the child; if it does not end soon, it is killed, and left behind.
    """
    receiving, sending = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        _run(partial(_tell, function), sending, signal.default_int_handler)
    os.close(sending)
    try:
        with open(receiving, "rb") as pipe:
            while True:
                kind, value = pickle.load(pipe)  # noqa: S301 - from our own child
                if kind is not None:
                    break
                heard(value)
    except EOFError:
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        raise CommandError(f"the process that did it ended with {ended}") from None
    except BaseException:
        _interrupt(child)
        raise
    os.waitpid(child, 0)
    if not kind:
        raise value
    result: T = value
    return result


def _tell(function: Callable[[Callable[[P], None]], T], pipe: int) -> T:
    def tell(value: P) -> None:
        os.write(pipe, pickle.dumps((None, value)))  # (small: all of it, or nothing)

    return function(tell)


def _interrupt(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGINT)
    deadline = time.monotonic() + _ENDING
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)


def _run(
    function: Callable[[int], object],
    sending: int,
    on_interrupt: Callable[[int, FrameType | None], object] | None = None,
) -> NoReturn:
    """In the child; the function is given what its answer goes into."""
    try:
        # Who reads our output must not wait for a child that was left behind, nor must
        # who waits for a lock in a descriptor that was passed on to us.
        kept = fcntl.fcntl(sending, fcntl.F_DUPFD_CLOEXEC, 3)
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for standard in range(3):
            os.dup2(nothing, standard)
        os.closerange(3, kept)
        os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
        signal.set_wakeup_fd(-1)  # an event loop's, which is closed here
        signal.signal(signal.SIGINT, signal.SIG_DFL if on_interrupt is None else on_interrupt)
        try:
            reply = pickle.dumps((True, function(kept)))
        except Exception as error:  # noqa: BLE001 - it is raised in the parent
            if not isinstance(error, (OSError, CommandError)):
                error.add_note(traceback.format_exc())
            reply = pickle.dumps((False, error))
        with open(kept, "wb") as pipe:
            pipe.write(reply)
        os._exit(0)
    finally:
        os._exit(1)


def _read(pipe: int, seconds: float) -> bytes:
    """Everything up to the end of the pipe.  Raises NotAnsweringError."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    deadline = time.monotonic() + seconds
    parts: list[bytes] = []
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise silent(seconds)
        part = os.read(pipe, 1 << 20)
        if not part:
            return b"".join(parts)
        parts.append(part)
