"""The least daemon that can have regions as msharefs has them; see paths.py.

    least_daemon.py MOUNTPOINT SOCKET LIFETIME

A name is a file of its mount, and whoever shows that file has the memory behind it.  It is one
process with one thread, keeps nothing that would survive it, asks nobody who they are, checks
nothing but which file is shown, limits nothing and answers no page fault.  For LIFETIME seconds
the kernel believes what it was told of a name.

It says `ready`, and serves until its input ends.  The other side is least_client.c.
"""

from __future__ import annotations

import array
import contextlib
import errno
import itertools
import os
import socket
import stat
import struct
import sys
from typing import Final

import pyfuse3
import trio

SIZE: Final = struct.Struct("=Q")
"""What a client sends: how much memory a new region has; 0 if it is none.  What it is told: how
much there is."""
ROOM: Final = socket.CMSG_SPACE(2 * array.array("i").itemsize)
FOREVER: Final = 3600.0


class Least(pyfuse3.Operations):
    """Names, and the memory behind them."""

    def __init__(self, lifetime: float) -> None:
        super().__init__()
        self._lifetime = lifetime
        self._numbers = itertools.count(pyfuse3.ROOT_INODE + 1)
        self._names: dict[bytes, int] = {}
        self.memory: dict[int, int] = {}
        """Descriptors, by the inodes of the names."""

    # -- the mount --

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(inode)
        is_root = inode == pyfuse3.ROOT_INODE
        entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o777 if is_root else stat.S_IFREG | 0o666)
        entry.attr_timeout = FOREVER
        entry.entry_timeout = self._lifetime
        return entry

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        inode = self._names.get(name)
        if inode is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(inode)

    async def create(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        inode = self._names[name] = next(self._numbers)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode)), self._attributes(inode)

    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode))

    async def unlink(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        memory = self.memory.pop(self._names.pop(name), None)
        if memory is not None:
            os.close(memory)

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        raise pyfuse3.FUSEError(errno.ENOSYS)  # and the kernel never asks again

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        return

    async def forget(self, inode_list: object) -> None:
        return

    # -- the socket --

    async def accept(self, listener: socket.socket) -> None:
        """Serve who connects; forever."""
        async with trio.open_nursery() as nursery:
            while True:
                await trio.lowlevel.wait_readable(listener)
                sock, _ = listener.accept()
                nursery.start_soon(self._hold, sock, await self._attach(sock))

    async def _attach(self, sock: socket.socket) -> list[int]:
        """Give who shows a region's file its memory; what it has sent that stays open."""
        while True:
            with contextlib.suppress(BlockingIOError):
                data, rights, _, _ = sock.recvmsg(
                    SIZE.size, ROOM, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
                )
                break
            await trio.lowlevel.wait_readable(sock)
        fds = array.array("i", rights[0][2])
        inode = os.fstat(fds[0]).st_ino
        os.close(fds[0])
        (size,) = SIZE.unpack(data)
        if size:
            self.memory[inode] = os.memfd_create("least")
            os.ftruncate(self.memory[inode], size)
        memory = self.memory[inode]
        if not size:
            size = os.fstat(memory).st_size
        own = array.array("i", [memory])
        sock.sendmsg([SIZE.pack(size)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, own)])
        return [*fds[1:]]

    async def _hold(self, sock: socket.socket, fds: list[int]) -> None:
        """Its userfaultfd, as long as it is connected."""
        await trio.lowlevel.wait_readable(sock)
        sock.close()
        for fd in fds:
            os.close(fd)


def _use_once(mountpoint: str) -> None:
    """Who serves a file must not wait for itself when it closes one: see `flush`."""
    path = os.path.join(mountpoint, "once")
    os.close(os.open(path, os.O_RDWR | os.O_CREAT))
    os.unlink(path)


async def _serve(operations: Least, listener: socket.socket, mountpoint: str) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        await trio.to_thread.run_sync(_use_once, mountpoint)
        nursery.start_soon(operations.accept, listener)
        print("ready", flush=True)
        await trio.lowlevel.wait_readable(sys.stdin)
        nursery.cancel_scope.cancel()


def main() -> None:
    """Serve until the input ends."""
    mountpoint, path, lifetime = sys.argv[1:]
    operations = Least(float(lifetime))
    options = {*pyfuse3.default_options, "fsname=least", "allow_other"}
    pyfuse3.init(operations, mountpoint, options)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(path)
            listener.listen()
            trio.run(_serve, operations, listener, mountpoint)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main()
