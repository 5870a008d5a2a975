"""Memory of our own that contents pass through on their way to UFFDIO_COPY."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from typing import Final

from msharefsd.linux import syscalls

BUFFER: Final = 2 << 20
MOST_BUFFERS: Final = 16


class Zeros:
    """Zeros to copy from: memory that is never written, and so takes none."""

    def __init__(self) -> None:
        self._length = 0
        self._start = 0

    def address(self, length: int) -> int:
        """Where `length` bytes of zeros are.  Raises OSError (ENOMEM)."""
        if length > self._length:
            flags = syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS | syscalls.MAP_NORESERVE
            start = syscalls.mmap(None, length, syscalls.PROT_READ, flags, -1, 0)
            # UFFDIO_COPY from pages that are absent takes a second huge page for a moment
            # (hugetlb_mfill_atomic_pte(), mm/hugetlb.c), and there may be one only.
            with contextlib.suppress(OSError):
                syscalls.madvise(start, length, syscalls.MADV_POPULATE_READ)
            if self._length:
                syscalls.munmap(self._start, self._length)
            self._start, self._length = start, length
        return self._start


class Buffer:
    """Memory of the daemon that file contents pass through on their way to UFFDIO_COPY."""

    def __init__(self, size: int) -> None:
        """`size` in bytes."""
        self._memory = mmap.mmap(-1, size)
        self.view = memoryview(self._memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))


class Buffers:
    """Buffers in stock, so that a fill needs no new memory."""

    def __init__(self) -> None:
        self._idle: list[Buffer] = []

    def take(self, size: int) -> Buffer:
        """A buffer of at least `size` bytes, with anything in it."""
        if size > BUFFER:
            return Buffer(size)
        return self._idle.pop() if self._idle else Buffer(BUFFER)

    def give_back(self, buffer: Buffer) -> None:
        """Nobody reads it any more."""
        if len(buffer.view) == BUFFER and len(self._idle) < MOST_BUFFERS:
            self._idle.append(buffer)
