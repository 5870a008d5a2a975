"""The calls of a sharer that change what is mapped in its region."""

from __future__ import annotations

import errno
from functools import partial
from typing import Final

from msharefsd.control import wire
from msharefsd.control.sharing import Sharing
from msharefsd.control.wire import Op, Request
from msharefsd.errors import Refused
from msharefsd.linux import syscalls
from msharefsd.memory import files
from msharefsd.paging import protection
from msharefsd.paging.pages import pages_of
from msharefsd.region.objects import Object
from msharefsd.region.region import Sharer

_PROTECTIONS: Final = syscalls.PROT_READ | syscalls.PROT_WRITE | syscalls.PROT_EXEC
_MMAP_FLAGS: Final = (
    syscalls.MAP_SHARED
    | syscalls.MAP_PRIVATE
    | syscalls.MAP_FIXED
    | syscalls.MAP_ANONYMOUS
    | syscalls.MAP_NORESERVE
)
_LARGEST_FILE: Final = (1 << 63) - 1


class Calls:
    """The calls of one connection on its region's address space."""

    def __init__(self, state: Sharing) -> None:
        self._state = state
        self._control = state.control

    async def ready(self) -> None:
        """The window is mapped and not open yet: protect in it what is protected."""
        sharer = self._state.need_sharer()
        if sharer.writable:
            await protection.admit(pages_of(sharer.region), sharer)
        else:
            await self._control.pages.watching.admit(sharer)

    async def change(self, request: Request, fds: list[int]) -> None:
        """Carry out one of them; takes a mapped file out of `fds`."""
        sharer = self._state.sharer
        building = self._state.building is not None
        if sharer is None or sharer.region.backing is None:
            raise Refused(errno.ENOTCONN, "this connection has attached no region")
        if building and request.op is not Op.MMAP:
            raise Refused(errno.EINVAL, "COMMIT or hang up first")
        if not sharer.writable and not building:
            raise Refused(errno.EACCES, "the region is attached read-only")
        spaces, region, (item,) = self._control.spaces, sharer.region, request.objects
        match request.op:
            case Op.MMAP:
                await self._mmap(sharer, item, fds)
            case Op.MUNMAP:
                await spaces.munmap(region, item.offset, item.length, sharer)
            case Op.MPROTECT:
                await spaces.mprotect(region, item.offset, item.length, item.prot, sharer)
            case Op.MSYNC:
                await spaces.msync(region, item.offset, item.length)
            case Op.DISCARD:
                await spaces.discard(region, item.offset, item.length, sharer)

    async def _mmap(self, sharer: Sharer, item: wire.WireObject, fds: list[int]) -> None:
        region = sharer.region
        if item.flags & ~_MMAP_FLAGS or item.prot & ~_PROTECTIONS:
            raise Refused(errno.EINVAL, "unknown flags or protection of mmap")
        kind = item.flags & (syscalls.MAP_SHARED | syscalls.MAP_PRIVATE)
        if kind not in (syscalls.MAP_SHARED, syscalls.MAP_PRIVATE):
            raise Refused(errno.EINVAL, "a mapping is MAP_SHARED or MAP_PRIVATE")
        private = kind == syscalls.MAP_PRIVATE
        fixed = bool(item.flags & syscalls.MAP_FIXED)
        new = Object(item.offset, item.length, item.prot, private)
        if item.flags & syscalls.MAP_ANONYMOUS:
            if not item.flags & syscalls.MAP_NORESERVE and region.backing is not None:
                region.backing.check_room(item.length)
            await self._control.spaces.mmap(region, new, replace=fixed, by=sharer)
            return
        if len(fds) != 1:
            raise Refused(errno.EBADF, "a mapping that is not anonymous takes a file")
        if item.file_offset % syscalls.PAGE or item.file_offset + item.length > _LARGEST_FILE:
            raise Refused(errno.EINVAL, "the file's offset is not in whole pages, or too large")
        if self._control.is_ours(syscalls.identify(fds[0])):
            raise Refused(errno.ENODEV, "a region's own files cannot be mapped in a region")
        write = bool(item.prot & syscalls.PROT_WRITE)
        may_write = files.check_mappable(fds[0], shared=not private, write=write)
        uid = self._state.peer.uid
        close = partial(self._control.disposal.close_fd, uid=uid)
        written = may_write and not private
        await files.check_mapping(self._control.threads, uid, fds[0], close, written=written)
        file = await self._control.mapped_files.new(fds.pop(), uid, may_write=may_write)
        try:
            new = Object(item.offset, item.length, item.prot, private, file, item.file_offset)
            await self._control.spaces.mmap(region, new, replace=fixed, by=sharer)
        finally:
            file.let_go()
