"""Points where a test can stop the daemon, to kill it there and nowhere else.

With MSHAREFSD_PARK=NAME in its environment the daemon stops itself (SIGSTOP) the first
time it comes to the barrier of that name.  Otherwise a barrier is one comparison.
"""

from __future__ import annotations

import os
import signal
from typing import Final

_PARK: Final = os.environ.get("MSHAREFSD_PARK")


def barrier(name: str) -> None:
    """Stop here, if this is the point that was asked for."""
    if name == _PARK:
        os.kill(os.getpid(), signal.SIGSTOP)
