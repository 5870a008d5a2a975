"""A file system of strange files: `strange.py MOUNTPOINT [USER]`.

`hangs`: a read of it never returns.  `fails`: a read of it is EIO.  `full`: a read
gives ones, a write never returns.  `slow`: a write takes a second.  `worn`: ones, but a
read of its page WORN is EIO.  Stop the process and everything hangs, close(2) too.

With a user's number it is mounted as if that user had, who is then the only one to
see it.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from typing import Any

import pyfuse3
import trio

from msharefsd.linux import syscalls

NAMES = {b"hangs": 2, b"fails": 3, b"full": 4, b"slow": 5, b"worn": 6}
WORN = range(3 * 4096, 4 * 4096)
SIZE = 16 << 20


class Strange(pyfuse3.Operations):
    def __init__(self) -> None:
        super().__init__()
        self._slow = bytearray(SIZE)

    async def getattr(self, inode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(inode)
        directory = inode == pyfuse3.ROOT_INODE
        entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o755 if directory else stat.S_IFREG | 0o644)
        entry.st_nlink = 1
        entry.st_size = 0 if directory else SIZE
        entry.entry_timeout = entry.attr_timeout = 60
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        if name not in NAMES:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(NAMES[name], ctx)

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), direct_io=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        if fh == NAMES[b"hangs"]:
            await trio.sleep_forever()
        if fh == NAMES[b"worn"] and off < WORN.stop and WORN.start < off + size:
            raise pyfuse3.FUSEError(errno.EIO)
        if fh in (NAMES[b"full"], NAMES[b"worn"]):
            return b"\1" * size
        if fh == NAMES[b"slow"]:
            return bytes(self._slow[off : off + size])
        raise pyfuse3.FUSEError(errno.EIO)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        if fh != NAMES[b"slow"]:
            await trio.sleep_forever()
        await trio.sleep(1)
        self._slow[off : off + len(buf)] = buf
        return len(buf)

    async def flush(self, fh: int) -> None:
        return


def mounted_by(user: str) -> str:
    """Mount it in the name of a user; what pyfuse3 takes for a mountpoint that is mounted."""
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id={user},group_id={user}"
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV
    syscalls.mount("strange", sys.argv[1], "fuse", flags, options)
    return f"/dev/fd/{device}"


def main() -> None:
    at = mounted_by(sys.argv[2]) if len(sys.argv) > 2 else sys.argv[1]
    pyfuse3.init(Strange(), at, {"fsname=strange"} if len(sys.argv) == 2 else set())
    print("ready", flush=True)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)
        os._exit(0)  # a read that hangs has a task that nobody ends


main()
