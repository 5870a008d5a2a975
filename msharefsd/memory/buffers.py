"""Memory of our own that contents pass through on their way to UFFDIO_COPY."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import Final

from msharefsd.linux import syscalls

BUFFER: Final = 2 << 20
MOST_BUFFERS: Final = 16


def withdraw(start: int, length: int) -> None:
    """Nobody can copy from there any more, and nothing else comes there before munmap(2)."""
    flags = syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS | syscalls.MAP_NORESERVE
    syscalls.mmap(start, length, syscalls.PROT_NONE, flags | syscalls.MAP_FIXED, -1, 0)


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

    def withdraw(self) -> tuple[int, int]:
        """Whoever copies from there copies nothing any more: see `withdraw`."""
        start, length = self._start, self._length
        self._start = self._length = 0
        if length:
            withdraw(start, length)
        return start, length


class Buffer:
    """Memory of the daemon that file contents pass through on their way to UFFDIO_COPY."""

    def __init__(self, size: int) -> None:
        """`size` in bytes.  Raises OSError (ENOMEM)."""
        flags = syscalls.MAP_SHARED | syscalls.MAP_ANONYMOUS
        prot = syscalls.PROT_READ | syscalls.PROT_WRITE
        self.address = syscalls.mmap(None, size, prot, flags, -1, 0)
        self.view = memoryview((ctypes.c_char * size).from_address(self.address)).cast("B")
        self.keep: Callable[[int, int], object] | None = None
        """Somebody may copy from here when it has been given back: who is told of that."""


class Buffers:
    """Buffers in stock, so that a fill needs no new memory."""

    def __init__(self) -> None:
        self._idle: list[Buffer] = []
        self._lent: dict[int, Buffer] = {}

    def take(self, size: int) -> Buffer:
        """A buffer of at least `size` bytes, with anything in it.  Raises OSError."""
        if size > BUFFER:
            buffer = Buffer(size)
        else:
            buffer = self._idle.pop() if self._idle else Buffer(BUFFER)
        self._lent[buffer.address] = buffer
        return buffer

    def copied_late(self, address: int, keep: Callable[[int, int], object]) -> None:
        """A call that does not come back copies from there: nothing any more after `give_back`.

        `keep` is told then what is to be unmapped when that call has come back.
        """
        for buffer in self._lent.values():
            if 0 <= address - buffer.address < len(buffer.view):
                buffer.keep = keep

    def give_back(self, buffer: Buffer) -> None:
        """Nobody reads it any more, nor its view."""
        del self._lent[buffer.address]
        size = len(buffer.view)
        if buffer.keep is not None:
            withdraw(buffer.address, size)
            buffer.keep(buffer.address, size)
        elif size == BUFFER and len(self._idle) < MOST_BUFFERS:
            self._idle.append(buffer)
        else:
            syscalls.munmap(buffer.address, size)
