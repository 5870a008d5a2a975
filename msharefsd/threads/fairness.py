"""Turns by user: who asks more often does not get more.

Trio runs tasks in turn, so a user with a hundred requests would have a hundred turns where
another has one.  Whoever works for a user's request says so here.  A user who has used up
a slice of the thread's time waits in line with other such users, one slice each in turn;
who has not goes first, without waiting.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Final

import trio

SLICE_SECONDS: Final = 0.002
"""How long one user goes on while others may wait (processor time of the thread)."""


class Turns:
    """The turns of one thread."""

    def __init__(self) -> None:
        self._spent: dict[int, float] = {}
        """Of those who have worked since nobody was in line."""
        self._line: dict[int, deque[trio.Event]] = {}
        self._work = trio.Event()

    @contextlib.asynccontextmanager
    async def turn(self, uid: int) -> AsyncIterator[None]:
        """Work for a user when it is its turn.  Nothing in there may await."""
        if uid in self._line or self._spent.get(uid, 0.0) > SLICE_SECONDS:
            await self._wait(uid)
        since = time.thread_time()
        try:
            yield
        finally:
            self._spent[uid] = self._spent.get(uid, 0.0) + time.thread_time() - since

    async def _wait(self, uid: int) -> None:
        event = trio.Event()
        line = self._line.setdefault(uid, deque())
        line.append(event)
        self._work.set()
        try:
            await event.wait()
        except BaseException:
            with contextlib.suppress(ValueError):
                line.remove(event)
            raise

    async def run(self) -> None:
        """Give turns; forever."""
        while True:
            await self._work.wait()
            self._work = trio.Event()
            while self._line:
                for uid in list(self._line):
                    await self._slice(uid)
            # Who is not in line has not asked for more than there was.
            self._spent.clear()

    async def _slice(self, uid: int) -> None:
        line = self._line[uid]
        self._spent[uid] = 0.0
        while line and self._spent[uid] <= SLICE_SECONDS:
            line.popleft().set()
            await trio.lowlevel.checkpoint()  # it works now, and who is new has asked
        if not line:
            del self._line[uid]
