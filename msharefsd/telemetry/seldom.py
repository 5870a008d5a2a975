"""For log lines that a client can provoke at will: not more than one in a while."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

import trio

INTERVAL: Final = 10.0
MOST_KEYS: Final = 1024


class Seldom:
    """Says yes once in INTERVAL seconds for each key."""

    def __init__(self) -> None:
        self._last: dict[Hashable, float] = {}

    def now(self, key: Hashable) -> bool:
        """Whether it is time again for `key`."""
        time = trio.current_time()
        if time - self._last.get(key, -INTERVAL) < INTERVAL:
            return False
        if len(self._last) >= MOST_KEYS:
            self._last.clear()
        self._last[key] = time
        return True
