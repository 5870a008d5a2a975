"""Waiting while the daemon is away."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Collection
from typing import Final, TypeVar

from libmshare import core
from libmshare.errors import GONE

T = TypeVar("T")

AGAIN: Final = 0.1
"""How soon it is tried again, in seconds."""


def mounted() -> str:
    """core.mshare_root(), once it was there: between two daemons nothing is mounted."""
    return patiently(core.mshare_root, {*GONE, errno.ENOENT})


def patiently(call: Callable[[], T], away: Collection[int] = GONE) -> T:
    """Call it, and again for as long as the daemon is away: $MSHARE_RECONNECT_SECONDS.

    `away`: the errnos that say so.
    """
    try:
        seconds = float(os.environ.get("MSHARE_RECONNECT_SECONDS", "30"))
    except ValueError:
        seconds = 30.0
    deadline = time.monotonic() + seconds
    while True:
        try:
            return call()
        except OSError as error:
            if error.errno not in away or time.monotonic() >= deadline:
                raise
        time.sleep(AGAIN)
