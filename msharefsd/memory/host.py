"""The host mapping: the pager's own mapping of a backing."""

from __future__ import annotations

import os

from msharefsd.linux import syscalls, uffd
from msharefsd.linux.uffd import Feature, Mode
from msharefsd.memory.sparse import SparseFile


class HostMapping:
    """The daemon's own mapping of a backing.

    It stands for the page table that a kernel would keep for the region.  It has a
    userfaultfd of its own, so that pages come into it as they come into a sharer:
    whole, or not at all.  Nobody touches it by pointer; a system call that touches
    an absent page of it fails (UFFD_FEATURE_SIGBUS) and never waits for us.
    """

    def __init__(self, memory: SparseFile, feature: Feature, address: int | None = None) -> None:
        """Map all of `memory`, at `address` if that is given.

        `feature` is that of a userfaultfd on such memory.  Raises OSError: ENOMEM when
        there is no room in the address space, EEXIST when `address` is taken.
        """
        self._size = memory.size
        fixed = 0 if address is None else syscalls.MAP_FIXED_NOREPLACE
        self.uffd = uffd.open_own()
        try:
            uffd.handshake(self.uffd, feature | Feature.SIGBUS)
            self.start = syscalls.mmap(
                address,
                memory.size,
                syscalls.PROT_READ | syscalls.PROT_WRITE,
                syscalls.MAP_SHARED | syscalls.MAP_NORESERVE | fixed,
                memory.fd,
                0,
            )
        except OSError:
            os.close(self.uffd)
            raise
        syscalls.madvise(self.start, memory.size, syscalls.MADV_DONTFORK)
        uffd.register(self.uffd, self.start, memory.size, Mode.MISSING)

    def close(self) -> None:
        """Unmap it."""
        syscalls.munmap(self.start, self._size)
        os.close(self.uffd)
