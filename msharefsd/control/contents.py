"""A sharer says that contents will come, and brings them: paging/bringing.py."""

from __future__ import annotations

import errno
from functools import partial
from typing import Final

from msharefsd.control import wire
from msharefsd.control.sharing import Sharing
from msharefsd.control.wire import Op, Reply, ReplyFlag, Request
from msharefsd.errors import Refused
from msharefsd.linux import syscalls
from msharefsd.memory import files
from msharefsd.paging.pages import pages_of
from msharefsd.region.objects import Object
from msharefsd.region.region import Sharer

_READ_WRITE: Final = syscalls.PROT_READ | syscalls.PROT_WRITE


class Contents:
    """Those calls of one connection."""

    def __init__(self, state: Sharing) -> None:
        self._state = state
        self._control = state.control

    async def call(self, request: Request, fds: list[int]) -> Reply:
        """AWAIT or FILL."""
        sharer = self._state.need_sharer()
        if not sharer.writable:
            raise Refused(errno.EACCES, "the region is attached read-only")
        (item,) = request.objects
        self._control.pages.bringers.heard(sharer)
        if request.op is Op.AWAIT:
            await self._await(sharer, item)
            return Reply(Op.AWAIT)
        if item.length or fds:
            await self._fill(sharer, item, fds)
            self._control.pages.bringers.heard(sharer)  # it may have taken its time
        wanted = pages_of(sharer.region).awaiting.wanted()
        if wanted is None:
            return Reply(Op.FILL)
        return Reply(Op.FILL, flags=ReplyFlag.WANTED, start=wanted)

    async def _await(self, sharer: Sharer, item: wire.WireObject) -> None:
        if item.flags not in (syscalls.MAP_SHARED, syscalls.MAP_PRIVATE):
            raise Refused(errno.EINVAL, "what is awaited is MAP_SHARED or MAP_PRIVATE")
        if not item.prot & syscalls.PROT_READ or item.prot & ~_READ_WRITE:
            raise Refused(errno.EINVAL, "what is awaited can be read")
        file = self._control.mapped_files.awaited(self._state.peer.uid)
        try:
            private = item.flags == syscalls.MAP_PRIVATE
            new = Object(item.offset, item.length, item.prot, private, file, item.offset)
            await self._control.spaces.mmap(sharer.region, new, replace=True, by=sharer)
        finally:
            file.let_go()

    async def _fill(self, sharer: Sharer, item: wire.WireObject, fds: list[int]) -> None:
        if len(fds) != 1:
            raise Refused(errno.EBADF, "what is brought comes in a memfd")
        files.check_memory(fds[0])
        close = partial(self._control.disposal.close_fd, uid=self._state.peer.uid)
        await self._control.bringing.fill(sharer, item.offset, item.length, fds[0], close)
