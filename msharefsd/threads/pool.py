"""Threads for what may block on a client's file, so many for each user and no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

T = TypeVar("T")


class Threads:
    """Runs what may block on a file, with a limit for each user."""

    def __init__(self, most: Callable[[int], int]) -> None:
        self._most = most
        self._limiters: dict[int, trio.CapacityLimiter] = {}

    async def run(self, uid: int, function: Callable[[], T]) -> T:
        """Run `function` in a thread of that user's."""
        limiter = self._limiters.get(uid)
        if limiter is None:
            idle = [each for each, of in self._limiters.items() if of.borrowed_tokens == 0]
            for each in idle:
                del self._limiters[each]
            limiter = self._limiters[uid] = trio.CapacityLimiter(self._most(uid))
        return await trio.to_thread.run_sync(function, limiter=limiter, abandon_on_cancel=True)
