"""Files of the run directory that are removed under a living daemon.

A cleaner, or somebody's rm -r.  Who has them open goes on, sharers notice nothing, and the next
daemon finds nothing.  None of them can be given its name again (linkat(2): ENOENT).  Nor are
they made anew: to go on the next daemon would need all of them, and they are several processes'.
The lock would be another daemon's perhaps, that has been started meanwhile, and the keeper is
found by its socket.  So it is told as long as it can be helped.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import trio

from msharefsd.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 2.0


def file_at(path: Path) -> tuple[int, int] | None:
    """Which file has that name; None if there is none, or that cannot be seen."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return found.st_dev, found.st_ino


class Lookout:
    """Looks whether files are still there that are open."""

    def __init__(
        self, paths: Iterable[Path], metrics: Metrics, others: Callable[[], Iterable[Path]] = tuple
    ) -> None:
        """What is not there now is looked after as soon as it is.

        `others()`: what has been removed of files that are not always the same.
        """
        self._metrics = metrics
        self._known = {path: file_at(path) for path in paths}
        self._others = others
        self._told: set[Path] = set()

    def look(self) -> list[Path]:
        """What has been removed, or is another file now, since the last time."""
        gone = set(self._others())
        for path, before in list(self._known.items()):
            now = file_at(path)
            if before is None:
                self._known[path] = now
            elif now != before:
                gone.add(path)
        gone -= self._told
        self._told |= gone
        return sorted(gone)

    async def run(self) -> None:
        """Look every other second, forever."""
        while True:
            await trio.sleep(LOOK_SECONDS)
            gone = self.look()
            if gone:
                self._metrics.lost_files.inc(len(gone))
                log.error(
                    "somebody has removed %s (a cleaner, rm): regions go on while this msharefsd "
                    "runs, and the next one will not know them: save what they hold, end the "
                    "programs that use them, and start msharefsd anew",
                    ", ".join(map(str, gone)),
                )
