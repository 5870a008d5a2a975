"""Points where a test can stop the daemon, to kill it there and nowhere else.

With MSHAREFSD_PARK=NAME in its environment the daemon stops itself (SIGSTOP) the first
time it comes to the barrier of that name; with MSHAREFSD_FAIL=NAME it fails there, as if it
could not start.  MSHAREFSD_PARK=@FILE has the name in a file, while there is one: so a test
has a daemon that runs stop.  Otherwise a barrier is two comparisons.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Final

from msharefsd.errors import StartError

_PARK: Final = os.environ.get("MSHAREFSD_PARK")
_FAIL: Final = os.environ.get("MSHAREFSD_FAIL")


def barrier(name: str) -> None:
    """Stop here, or fail, if this is the point that was asked for."""
    if _PARK and name == (_in_file(_PARK[1:]) if _PARK[0] == "@" else _PARK):
        os.kill(os.getpid(), signal.SIGSTOP)
    if name == _FAIL:
        raise StartError(f"{name}: it was to fail here")


def _in_file(path: str) -> str:
    with contextlib.suppress(FileNotFoundError):
        return Path(path).read_text()
    return ""
