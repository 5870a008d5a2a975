"""Calls of ours into our own mount, which must not outlive us.

A thread that waits for the reply to a FUSE request cannot be killed once the request has
been read.  If the daemon is killed in that moment, the thread stays, with the process's
descriptor table, and that has /dev/fuse: so the connection would never end, and with it
neither the thread nor anybody else's requests in the mount, for good.  So such a thread
has a descriptor table of its own, without /dev/fuse.  (For the same reason nothing here
uses pyfuse3's invalidate_entry(): the kernel has it wait for a lock that a client holds
while its request waits for us.)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection
from typing import Final

import trio

from msharefsd.linux import syscalls

_FIRST: Final = 3
_MOST: Final = 1 << 20


async def run(function: Callable[[], object], keep: Collection[int] = ()) -> None:
    """Call `function` in such a thread; `keep`: the descriptors of ours that it needs.

    Raises what it raises; when cancelled it is left to itself.
    """
    failure: list[BaseException] = []

    def apart() -> None:
        try:
            _leave_all_but(keep)
            function()
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            failure.append(error)

    def wait() -> None:
        # trio's threads live on and need trio's descriptors.
        thread = threading.Thread(target=apart, daemon=True)
        thread.start()
        thread.join()

    await trio.to_thread.run_sync(wait, abandon_on_cancel=True)
    if failure:
        raise failure[0]


def _leave_all_but(keep: Collection[int]) -> None:
    try:
        syscalls.unshare(syscalls.CLONE_FILES)
    except PermissionError:
        return  # a container's filter forbids it: then the risk is there
    first = _FIRST
    for fd in sorted(keep):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, _MOST)
