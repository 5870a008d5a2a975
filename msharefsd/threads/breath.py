"""Pauses in what takes long."""

from __future__ import annotations

import time
from typing import Final

import trio

BREATH_SECONDS: Final = 0.002


class Breath:
    """Lets other things happen when something has taken a while."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    async def take(self) -> None:
        """Let others go first if it has taken long enough."""
        if time.monotonic() - self._since > BREATH_SECONDS:
            await trio.lowlevel.checkpoint()
            self._since = time.monotonic()
