"""What holds a region's pages.

A backing has a name, so it outlives the daemon, and mode 0600, so nobody gets a
descriptor of it but through the control socket.  Its descriptor is the capability
to attach: a child after fork shows it to prove that its parent was a sharer.

The daemon never reads or writes the pages by pointer.  A sharer with write
permission can truncate the object, and a pointer would then be SIGBUS in the
daemon; a system call just fails.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from typing import Final

import posix_ipc

from msharefsd import kernel
from msharefsd.errors import Refused

SHM_DIRECTORY: Final = "/dev/shm"  # noqa: S108 - where shm_open(3) has its objects
HUGE_PAGE: Final = 2 << 20


class ShmBacking:
    """POSIX shared memory: 4 KiB pages on /dev/shm, whoever touches first pays."""

    kind: Final = "shm"

    def __init__(self, name: str, size: int) -> None:
        """Create the object `name` of `size` bytes, all of them absent.

        Raises Refused (EMFILE, ENFILE, ENOSPC, ENOMEM as the kernel says).
        """
        self.name = name
        self.size = size
        self._host: int | None = None
        try:
            memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=size)
        except (OSError, posix_ipc.Error, ValueError) as error:
            code = error.errno if isinstance(error, OSError) and error.errno else errno.ENOSPC
            raise Refused(code, f"cannot create shared memory {name}: {error}") from error
        self.fd: int = memory.fd
        # Descriptions of their own for the sharers: they may seek and set flags.
        self._writable = self._open(os.O_RDWR)
        self._readable = self._open(os.O_RDONLY)
        self.identity = kernel.identify(self.fd)

    def _open(self, access: int) -> int:
        return os.open(SHM_DIRECTORY + self.name, access | os.O_CLOEXEC | os.O_NOFOLLOW)

    def descriptor(self, *, writable: bool) -> int:
        """The descriptor to send to a sharer; it stays the backing's."""
        return self._writable if writable else self._readable

    def allocated(self) -> int:
        """Bytes of memory that the region holds."""
        return os.fstat(self.fd).st_blocks * 512

    def next_absent(self, offset: int) -> int:
        """The first byte at or after `offset` whose page is absent (lseek(2), SEEK_HOLE)."""
        try:
            return os.lseek(self.fd, offset, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # beyond the end: truncated by a sharer
                return self.size
            raise

    def populate(self, offset: int, length: int) -> None:
        """Populate pages through the host mapping; the daemon pays for them.

        The host mapping stands for the page table that a kernel would keep for
        the region.  It is made when it is first needed, because a 512 GiB window
        takes one 256th of the address space.

        Raises OSError: ENOMEM, EFAULT or ENOSPC when there is no memory.
        """
        if self._host is None:
            self._host = kernel.mmap(
                None,
                self.size,
                kernel.PROT_READ | kernel.PROT_WRITE,
                kernel.MAP_SHARED | kernel.MAP_NORESERVE,
                self.fd,
                0,
            )
            kernel.madvise(self._host, self.size, kernel.MADV_DONTFORK)
        kernel.madvise(self._host + offset, length, kernel.MADV_POPULATE_WRITE)

    def close(self) -> None:
        """Remove the name and let go; the memory goes with its last mapping."""
        if self._host is not None:
            kernel.munmap(self._host, self.size)
            self._host = None
        for fd in (self.fd, self._writable, self._readable):
            os.close(fd)
        # Somebody with the right to it (root) may have been faster.
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_shared_memory(self.name)


def remove_leftovers(prefix: str) -> list[str]:
    """Unlink shared memory objects of a daemon that died; returns their names."""
    pattern = re.compile(re.escape(prefix.lstrip("/")) + r"\d+\Z")
    names = [name for name in os.listdir(SHM_DIRECTORY) if pattern.match(name)]
    for name in names:
        posix_ipc.unlink_shared_memory("/" + name)
    return names
