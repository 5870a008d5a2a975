"""Calls on the mount from an event loop, with a limit.

As in `ask`, they are made in children.  A page asks again and again: so that a daemon that
hangs does not cost a process each time, only one child is there at a time, and while one that
was killed has not ended, nothing is asked.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Final, TypeVar

from libmshare.cli.ask import answer, begin, silent

T = TypeVar("T")
_PAUSE: Final = 0.001
"""Between two looks at a child that has answered and is about to end (seconds)."""


class Asker:
    """One caller after the other; each has an answer, or a refusal, in bounded time."""

    def __init__(self, seconds: float) -> None:
        """`seconds`: how long a caller waits, for others and for the answer."""
        self._seconds = seconds
        self._turn = asyncio.Lock()
        self._child: int | None = None
        """One that may not have ended."""
        self._status = 0
        """How the last one has ended (waitpid(2))."""

    async def ask(self, function: Callable[[], T]) -> T:
        """What `function` returns, or raises, in a child process.

        Raises NotAnsweringError when the time is over, and at once while the daemon still holds
        the child of another call; OSError if there is no room for a child.
        """
        try:
            async with asyncio.timeout(self._seconds), self._turn:
                if not self._ended():
                    raise silent(self._seconds)
                result: T = await self._call(function)
                return result
        except TimeoutError:
            raise silent(self._seconds) from None

    async def _call(self, function: Callable[[], T]) -> T:
        self._child, pipe = begin(function)
        try:
            reply = await _read(pipe)
            while not self._ended():
                await asyncio.sleep(_PAUSE)
        except BaseException:
            if self._child is not None:
                os.kill(self._child, signal.SIGKILL)
            raise
        result: T = answer(reply, self._status)
        return result

    def _ended(self) -> bool:
        """Whether no child is there any more."""
        if self._child is not None:
            child, status = os.waitpid(self._child, os.WNOHANG)
            if child:
                self._child, self._status = None, status
        return self._child is None


async def _read(pipe: int) -> bytes:
    """Everything up to the end of the pipe, which is closed then."""
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(pipe, "rb", buffering=0)
    )
    try:
        return await reader.read()
    finally:
        transport.close()
