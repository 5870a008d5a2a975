"""To be an ordinary user: a daemon, or for a moment."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

NOBODY = 65534

BECOME_NOBODY = f"""
# The interpreter may lie where only root can read: import first, then become the
# user, and be dumpable again (prctl(2)), as a program that the user started is.
import ctypes, os, sys
import msharefsd.command
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
sys.exit(msharefsd.command.main(sys.argv[1:]))
"""


@contextlib.contextmanager
def seen_by(uid: int) -> Iterator[None]:
    """What this thread asks of file systems a user asks (setfsuid(2))."""
    libc = ctypes.CDLL(None)
    libc.setfsuid(uid)
    try:
        yield
    finally:
        libc.setfsuid(os.geteuid())
