"""Memory whose contents are on their way: somebody brings them (paging/bringing.py).

In a region's map that is an object like one of a file.  So what holds of files' pages holds
of its pages, too: who touches one that is absent waits for it, nobody ever makes it of zeros,
and of somebody untrusted nothing is believed that is in its place.  But it has no descriptor,
nothing is ever written to it, and what has been brought is ordinary memory.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from typing import Final

from msharefsd.linux.syscalls import FileIdentity
from msharefsd.memory.files import MappedFile

_NOWHERE: Final = FileIdentity(0, 0, 0, stat.S_IFREG)


class Awaited(MappedFile):
    """What one call said that will be brought."""

    takes_writes = False

    def __init__(self, uid: int, *, close: Callable[[int], None], key: int) -> None:
        """`close` is told when nothing of it is awaited any more, of the descriptor -1."""
        super().__init__(
            -1, uid, may_write=False, close=close, key=key, identity=_NOWHERE, path=b"[awaited]"
        )
