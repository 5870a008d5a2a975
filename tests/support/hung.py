"""A file system that everybody may use and that does not answer: `hung.py MOUNTPOINT`.

A read of `hangs` never returns, nor does a write to `full`, which reads as ones, nor any
close(2) of `closes`; a read of `fails` is EIO; a write to `slow` returns after SIGUSR1.  What
everybody may mount where fusermount3 has user_allow_other.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import sys
from typing import Any, Final

import pyfuse3
import trio

NAMES: Final = {b"hangs": 2, b"full": 3, b"fails": 4, b"closes": 5, b"slow": 6}
SIZE: Final = 16 << 20


class Hung(pyfuse3.Operations):
    def __init__(self) -> None:
        super().__init__()
        self._content = bytearray(b"\1" * SIZE)
        self._go_on = trio.Event()

    async def told(self) -> None:
        with trio.open_signal_receiver(signal.SIGUSR1) as signals:
            print("ready", flush=True)
            async for _ in signals:
                self._go_on.set()

    async def getattr(self, inode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(inode)
        directory = inode == pyfuse3.ROOT_INODE
        entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o755 if directory else stat.S_IFREG | 0o666)
        entry.st_nlink = 1
        entry.st_size = 0 if directory else SIZE
        entry.entry_timeout = entry.attr_timeout = 600
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        if name not in NAMES:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(NAMES[name], ctx)

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode))

    async def read(self, fh: int, off: int, size: int) -> bytes:
        if fh == NAMES[b"hangs"]:
            await trio.sleep_forever()
        if fh == NAMES[b"fails"]:
            raise pyfuse3.FUSEError(errno.EIO)
        return bytes(self._content[off : off + size])

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        if fh != NAMES[b"slow"]:
            await trio.sleep_forever()
        await self._go_on.wait()
        self._content[off : off + len(buf)] = buf
        return len(buf)

    async def flush(self, fh: int) -> None:
        if fh == NAMES[b"closes"]:
            await trio.sleep_forever()


async def serve(files: Hung) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(files.told)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


def main() -> None:
    files = Hung()
    pyfuse3.init(files, sys.argv[1], {"fsname=hung", "allow_other"})
    try:
        trio.run(serve, files)
    finally:
        pyfuse3.close(unmount=False)
        os._exit(0)  # a read that hangs has a task that nobody ends


main()
