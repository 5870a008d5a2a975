"""To be an ordinary user: a daemon, or for a moment."""

from __future__ import annotations

import contextlib
import ctypes
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

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


def run_as(user: int, function: Callable[[], None]) -> None:
    """Run it in a process of that user's; it must succeed."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            # As after exec: a donor looks into its own /proc/self.
            ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE
            function()
        except BaseException:  # noqa: BLE001 - it is told, and the child ends
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0


@contextlib.contextmanager
def seen_by(uid: int) -> Iterator[None]:
    """What this thread asks of file systems a user asks (setfsuid(2))."""
    libc = ctypes.CDLL(None)
    libc.setfsuid(uid)
    try:
        yield
    finally:
        libc.setfsuid(os.geteuid())


def found_by(mount: Path, *users: int) -> None:
    """They have been there: the daemon has a control socket for each, and keeps it."""
    for uid in users:
        with seen_by(uid):
            os.stat(mount / ".control")
