"""An msharefs of mallory's: `impostor.py MOUNTPOINT USER SOCKET`.

In the mount table it looks as the daemon's own does, but for whose it is.  Everybody may
look into it, as where fusermount3 has user_allow_other; its .control leads to SOCKET.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from typing import Any, Final

import pyfuse3
import trio

from msharefsd.linux import syscalls

NAMES: Final = {b".control": 2, b"counter": 3, b"mshare_info": 4}
TEXT: Final = b"2097152\n"


class Impostor(pyfuse3.Operations):
    async def getattr(self, inode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(inode)
        kind = stat.S_IFREG | 0o666
        if inode == pyfuse3.ROOT_INODE:
            kind = stat.S_IFDIR | 0o755
        elif inode == NAMES[b".control"]:
            kind = stat.S_IFLNK | 0o777
        entry.st_mode = pyfuse3.ModeT(kind)
        entry.st_nlink = 1
        entry.st_size = len(TEXT)
        entry.entry_timeout = entry.attr_timeout = 60
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        if name not in NAMES:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(NAMES[name], ctx)

    async def readlink(self, inode: int, ctx: Any) -> pyfuse3.FileNameT:
        return pyfuse3.FileNameT(os.fsencode(sys.argv[3]))

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode))

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return TEXT[off : off + size]

    async def flush(self, fh: int) -> None:
        return


def main() -> None:
    device = os.open("/dev/fuse", os.O_RDWR)
    user = sys.argv[2]
    options = f"fd={device},rootmode=40000,user_id={user},group_id={user},allow_other"
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV
    syscalls.mount("msharefs", sys.argv[1], "fuse.msharefs", flags, options)
    pyfuse3.init(Impostor(), f"/dev/fd/{device}", set())
    print("ready", flush=True)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)
        os._exit(0)


main()
