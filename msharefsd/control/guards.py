"""Where sharers' userfaultfds outlive us, and their own processes' copies.

When the last copy of a userfaultfd is closed the kernel ends its registrations
(userfaultfd_release(), fs/userfaultfd.c), and from then on an absent page of a window that
is still mapped comes as zeros, for everybody.  A process closes its copy sooner or later:
closefrom(3), a daemon's beginning, a runtime that cleans up.  Ours go with us.  So a third
one is where nothing of that reaches it, in the user's keeper (life/keeping.py), before
the sharer is told that it may map anything and until it is a sharer no more.

The last close of a userfaultfd waits for the lock of its address space, which a process of
another user can hold for ever (lanes.py): neither our own table may have theirs, nor may the
keeper give them back into it.  So theirs are kept on the way: each lies unread in a socket of
its own, and the keeper has that.  The next pager's lane reads it, and leaves it there.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Final

from msharefsd.errors import Refused
from msharefsd.memory.kept import Store
from msharefsd.paging.window import window_of
from msharefsd.region.region import Sharer

_GUARD: Final = 1 << 62
"""What sets their keys apart from those of files and of memory (life/saving.py)."""


class Guards:
    """Keeps each sharer's userfaultfd."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def keep(self, sharer: Sharer) -> None:
        """Returns when it would survive us.  Raises Refused.

        Of a process of another user that has been done by `keep_far`.
        """
        if window_of(sharer).far is None:
            await self._put(sharer.number, sharer.uffd)

    async def keep_far(self, number: int, waiting: int) -> None:
        """The same of another user's, which waits there; that is closed.  Raises Refused."""
        try:
            await self._put(number, waiting, stays=False)
        finally:
            os.close(waiting)

    async def _put(self, number: int, fd: int, *, stays: bool = True) -> None:
        try:
            await self._store.put(_GUARD | number, fd, stays=stays)
        except OSError as error:
            raise Refused(
                error.errno or errno.EIO, f"nobody to keep the userfaultfd: {error.strerror}"
            ) from error

    def handed_on(self, number: int) -> None:
        """A lane has what the keeper had."""
        self._store.closes(_GUARD | number)

    def let_go(self, sharer: Sharer) -> None:
        """It is about to be closed, everywhere."""
        self._store.remove(_GUARD | sharer.number)

    def drop(self, number: int) -> None:
        """What was kept of a sharer that is none any more."""
        self._store.remove(_GUARD | number)


def on_the_way(fd: int) -> int:
    """A socket in which a duplicate of `fd` waits.  Raises OSError."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        socket.send_fds(here, [b"x"], [fd])
        return there.detach()


def split(kept: dict[int, int]) -> tuple[dict[int, int], dict[int, int]]:
    """What a keeper had: the rest by its keys, and userfaultfds by their sharers' numbers."""
    files = {key: fd for key, fd in kept.items() if not key & _GUARD}
    guards = {key & ~_GUARD: fd for key, fd in kept.items() if key & _GUARD}
    return files, guards
