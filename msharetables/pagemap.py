"""What the kernel says of page tables: /proc/PID/pagemap, /proc/kpagecount.

A page that is present in a process's pagemap is in its page table, without a fault.
/proc/kpagecount has how many page tables have a page: its mapcount, by the number of
its page frame.  Frames are told to CAP_SYS_ADMIN alone; to others they read as 0.
See Documentation/admin-guide/mm/pagemap.rst.

Every function raises OSError.  They are for threads: a process may hold the lock of
its address space (mmap_lock) for long.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Iterator
from enum import IntFlag
from typing import Final, Self

from msharetables.calls import HUGE_PAGE, PAGE

_ENTRY: Final = struct.Struct("=Q")
_PRESENT: Final = 1 << 63
_FRAME: Final = (1 << 55) - 1

_SCAN: Final = 0xC0606610
"""PAGEMAP_SCAN: _IOWR('f', 16, struct pm_scan_arg), Linux 6.7."""
# size, flags, start, end, walk_end, vec, vec_len, max_pages, category_inverted,
# category_mask, category_anyof_mask, return_mask
_ARGUMENT: Final = struct.Struct("=12Q")
_WALK_END: Final = 4 * 8
_FOUND: Final = 256
"""How many ranges one ioctl returns; with the argument they are too few to matter."""
_RANGE: Final = struct.Struct("=3Q")
_LONGEST: Final = (1 << 30) // PAGE
"""For how many pages of it a process's mmap_lock is held at most, for reading."""


class Category(IntFlag):
    """What PAGEMAP_SCAN knows of a page."""

    FILE = 1 << 2
    """Of a file, or shared: not of anonymous private memory."""
    PRESENT = 1 << 3
    SWAPPED = 1 << 4
    """Something else than a page: swapped out, or a marker of userfaultfd."""
    HUGE = 1 << 6
    """Mapped by one entry of a table that has no table of small pages under it."""


# What is asked for thousands of times: operations on an IntFlag take a microsecond each.
HUGE: Final = int(Category.HUGE)
FILE: Final = int(Category.FILE)
_THERE: Final = int(Category.PRESENT | Category.SWAPPED)


class _Range(ctypes.Structure):
    _fields_ = (
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("categories", ctypes.c_uint64),
    )


class Pagemap:
    """/proc/PID/pagemap of one process."""

    def __init__(self, process: int | str) -> None:
        """Of `process`, a pid or "self".  Raises OSError (EACCES, ENOENT, ESRCH)."""
        self._fd = os.open(f"/proc/{process}/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def _entry(self, address: int) -> int:
        data = os.pread(self._fd, _ENTRY.size, address // PAGE * _ENTRY.size)
        # Nothing: past the end of user space, or the process has ended.
        return int(_ENTRY.unpack(data)[0]) if data else 0

    def has(self, address: int) -> bool:
        """Whether the page at `address` is in the process's page table."""
        return bool(self._entry(address) & _PRESENT)

    def frame(self, address: int) -> int:
        """The number of the page frame there; 0 if there is none, or it is not for us."""
        entry = self._entry(address)
        return entry & _FRAME if entry & _PRESENT else 0

    def scan(self, start: int, end: int, most: int = 0) -> Iterator[tuple[int, int, Category]]:
        """The runs in [start, end) of what the page table has an entry for.

        Each is (start, end, categories).  Not more than `most` bytes of them, if that is
        given.  Raises OSError: ENOTTY before Linux 6.7.
        """
        found = (_Range * _FOUND)()
        wanted = int(Category.PRESENT | Category.SWAPPED)
        returned = wanted | int(Category.HUGE)
        while start < end:
            argument = bytearray(
                _ARGUMENT.pack(
                    _ARGUMENT.size, 0, start, end, 0, ctypes.addressof(found), _FOUND,
                    most // PAGE, 0, 0, wanted, returned,
                )
            )  # fmt: skip
            count = fcntl.ioctl(self._fd, _SCAN, argument)
            for one in found[:count]:
                yield one.start, one.end, Category(one.categories)
            if most and count:
                return
            (start,) = _ENTRY.unpack_from(argument, _WALK_END)

    def slots(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Where in [start, end) there are tables of small pages, or huge pages.

        Each is (start, end, the bits of `Category`).  Of small pages only the first run of
        each 2 MiB has to be told, and it is all that is looked at: that a table is there is
        known by then.  Huge pages are told in runs, whole ones.  Raises OSError: ENOTTY before
        Linux 6.7.
        """
        found = (_Range * _FOUND)()
        memory = memoryview(found).cast("B")
        vector = ctypes.addressof(found)
        argument = bytearray(_ARGUMENT.size)
        most, bits = 1, 0
        while start < end:
            _ARGUMENT.pack_into(
                argument, 0, _ARGUMENT.size, 0, start, end, 0, vector, _FOUND, most, 0, 0,
                _THERE, _THERE | HUGE | FILE,
            )  # fmt: skip
            count = fcntl.ioctl(self._fd, _SCAN, argument)
            if not count:
                (walked,) = _ENTRY.unpack_from(argument, _WALK_END)
                start = max(walked, start + PAGE)
                continue
            for low, high, bits in _RANGE.iter_unpack(memory[: count * _RANGE.size]):
                start = high + -high % HUGE_PAGE
                yield (low - low % HUGE_PAGE, start, bits) if bits & HUGE else (low, high, bits)
            # Where huge pages are there are more of them.
            most = min(most * 512, _LONGEST) if bits & HUGE else 1

    def pages(self, start: int, end: int) -> int:
        """Which pages of [start, end) the page table has an entry for: bit N for page N.

        For short ranges.  Raises OSError.
        """
        bits = 0
        for low, high, _ in self.scan(start, end):
            bits |= ((1 << (high - low) // PAGE) - 1) << (low - start) // PAGE
        return bits


class TableCounts:
    """/proc/kpagecount."""

    def __init__(self) -> None:
        """Raises OSError (EACCES, ENOENT)."""
        self._fd = os.open("/proc/kpagecount", os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def of(self, frame: int) -> int:
        """How many page tables have the page of that frame."""
        data = os.pread(self._fd, _ENTRY.size, frame * _ENTRY.size)
        return int(_ENTRY.unpack(data)[0]) if data else 0
