"""Sparse files in memory: of each page it is known whether it is there.

The daemon never reads or writes the pages by pointer.  A sharer with write
permission can truncate the file, and a pointer would then be SIGBUS in the
daemon; a system call just fails.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterator
from typing import Final

from msharefsd.linux import syscalls
from msharefsd.threads.disposal import Disposal

log = logging.getLogger(__name__)

AT_ONCE: Final = 64 << 20
"""How much memory is worked on without letting anything else happen (bytes)."""


class SparseFile(abc.ABC):
    """A file in memory of which each page is there or absent."""

    page: int = syscalls.PAGE
    """Its page size: what comes, goes and is protected as a whole (bytes)."""

    def __init__(self, name: str, size: int, fd: int) -> None:
        """`fd` is taken over."""
        self.name = name
        self.size = size
        self.fd = fd

    @property
    def nameless(self) -> bool:
        """Whether somebody has removed its name."""
        return os.fstat(self.fd).st_nlink == 0

    def reopen(self, path: str, access: int) -> int:
        """Another open file description; by its name, if it has one.  Raises OSError."""
        if self.nameless:
            return os.open(f"/proc/self/fd/{self.fd}", access | os.O_CLOEXEC)
        return os.open(path, access | os.O_CLOEXEC | os.O_NOFOLLOW)

    def allocated(self) -> int:
        """Bytes of memory that it holds."""
        return os.fstat(self.fd).st_blocks * 512

    def next_data(self, offset: int) -> int:
        """The first byte at or after `offset` whose page is there (SEEK_DATA), or `size`."""
        return self._seek(offset, os.SEEK_DATA)

    def next_absent(self, offset: int) -> int:
        """The first byte at or after `offset` whose page is absent (SEEK_HOLE)."""
        return self._seek(offset, os.SEEK_HOLE)

    def _seek(self, offset: int, whence: int) -> int:
        try:
            return os.lseek(self.fd, offset, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing more, or truncated by a sharer
                return self.size
            raise

    def data(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The runs of pages in the range that are there: (start, end), bytes."""
        return data_of(self.fd, offset, offset + length)

    def punch(self, offset: int, length: int) -> None:
        """Make pages absent: freed, and unmapped in every process."""
        punch_fd(self.fd, offset, length)

    @abc.abstractmethod
    def _unlink(self) -> None:
        """Remove the name, if it is still there.  Raises OSError."""

    def close(self, disposal: Disposal) -> None:
        """Remove the name and let go; the memory goes with its last mapping."""
        disposal.close_fd(self.fd)
        with contextlib.suppress(OSError):
            self._unlink()


def data_of(fd: int, offset: int, end: int) -> Iterator[tuple[int, int]]:
    """The runs of pages in [offset, end) that are there: (start, end), bytes.  Raises OSError."""
    while offset < end:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
            if start >= end:
                return
            absent = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing more, or truncated by a sharer
                return
            raise
        offset = min(max(absent, start + syscalls.PAGE), end)
        yield start, offset


def punch_fd(fd: int, offset: int, length: int) -> None:
    """Make pages absent: freed, and unmapped in every process.  Raises OSError."""
    try:
        if os.lseek(fd, offset, os.SEEK_DATA) >= offset + length:
            return
    except OSError as error:
        if error.errno == errno.ENXIO:
            return
        raise
    syscalls.punch(fd, offset, length)


def open_left(path: str, size: int) -> int:
    """Open what another daemon made.  Raises OSError if it is not there.

    EPERM if it is not ours alone.  What a sharer has truncated has its size again.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    return check_left(fd, path, size)


def check_left(fd: int, path: str, size: int) -> int:
    """The same of what is open already; `fd` is closed if it is not as it should be."""
    status = os.fstat(fd)
    if (
        not stat.S_ISREG(status.st_mode)
        or status.st_uid != os.geteuid()
        or stat.S_IMODE(status.st_mode) != 0o600
    ):
        os.close(fd)
        raise OSError(errno.EPERM, "it has another owner or mode than it was given")
    if status.st_size != size:
        log.warning("%s was cut to %d bytes", path, status.st_size)
        os.ftruncate(fd, size)
    return fd
