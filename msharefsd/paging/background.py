"""What one fault needs, and others need not wait for."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio

log = logging.getLogger(__name__)

AGAIN_SECONDS: Final = 0.2
"""How often what there is no room for, on a disk or in /dev/shm, is tried again."""


class Background:
    """Runs it; a defect in one is not the end of all."""

    def __init__(self) -> None:
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Forever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    def start(self, function: Callable[..., Awaitable[object]], *arguments: object) -> None:
        """Have it run."""
        assert self._nursery is not None, "run() is not running"
        self._nursery.start_soon(_contained, function, *arguments)


async def _contained(function: Callable[..., Awaitable[object]], *arguments: object) -> None:
    try:
        await function(*arguments)
    except Exception:
        log.exception("%s failed", getattr(function, "__name__", function))
