"""How much of shared memory is there, 2 MiB by 2 MiB.

A huge page takes 2 MiB, whatever was there before: a chunk with a single page in it becomes
512 times as large.  So nothing is made huge before it is known how full it is.  The file
itself tells that (SEEK_DATA, SEEK_HOLE); it can be had from /proc/PID/map_files by who has
CAP_CHECKPOINT_RESTORE, CAP_SYS_ADMIN, or is the process.  Else the page tables of some
sharers tell what is there at least.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

from msharetables.calls import HUGE_PAGE, PAGE
from msharetables.pagemap import Pagemap
from msharetables.proc import Vma


def open_mapped(pid: int, vma: Vma) -> int:
    """A descriptor of what is mapped there, for reading; only for files that are memory.

    Raises OSError; waits for the process's mmap_lock.
    """
    path = f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}"
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def look(pid: int, vma: Vma, blocks: int) -> tuple[int, list[int]]:
    """How much memory the object has that is mapped there, and which chunks have some of it.

    The first in blocks (stat(2)).  If that is `blocks`, chunks are not looked for: none.  Raises
    OSError; waits for the process's mmap_lock.
    """
    fd = open_mapped(pid, vma)
    try:
        now = os.fstat(fd).st_blocks
        return now, [] if now == blocks else list(_with_data(fd))
    finally:
        os.close(fd)


def _with_data(fd: int) -> Iterator[int]:
    end = 0
    with contextlib.suppress(OSError):  # nothing more
        while True:
            start = os.lseek(fd, end, os.SEEK_DATA)
            first = max(start - start % HUGE_PAGE, end + -end % HUGE_PAGE if end else 0)
            end = os.lseek(fd, start, os.SEEK_HOLE)
            yield from range(first, end, HUGE_PAGE)


def of_file(fd: int, chunks: Iterable[int]) -> dict[int, int]:
    """How many bytes of the chunks at these offsets are there; offsets upwards.

    In one pass: the kernel looks at each page of a run to find its end.
    """
    found: dict[int, int] = {}
    searched, start, end = 0, 0, 0  # nothing in [searched, start), all of [start, end)
    for chunk in chunks:
        present, at, stop = 0, chunk, chunk + HUGE_PAGE
        while at < stop:
            if not searched <= at < end:
                searched = at
                try:
                    start = os.lseek(fd, at, os.SEEK_DATA)
                    end = os.lseek(fd, start, os.SEEK_HOLE)
                except OSError:  # nothing more, or it was truncated
                    start = end = stop
            present += max(min(end, stop) - max(at, start), 0)
            at = max(end, start) if start < stop else stop
        found[chunk] = present
    return found


def of_sharers(mapped: Iterable[tuple[Pagemap, int]]) -> int:
    """The same as far as page tables tell; where each has the chunk mapped.  Raises OSError."""
    pages = 0
    for pagemap, address in mapped:
        pages |= pagemap.pages(address, address + HUGE_PAGE)
    return pages.bit_count() * PAGE


def whole_chunks(fd: int, ranges: Iterable[tuple[int, int]]) -> Iterator[int]:
    """The chunks that lie in one of the ranges and are there as a whole.

    Ranges are (start, end) in bytes, upwards.
    """
    for start, end in ranges:
        at = start + -start % HUGE_PAGE
        while at + HUGE_PAGE <= end:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
                at += -at % HUGE_PAGE
                absent = os.lseek(fd, at, os.SEEK_HOLE)
            except OSError:
                return  # nothing more, or truncated by a sharer
            while at + HUGE_PAGE <= min(absent, end):
                yield at
                at += HUGE_PAGE
            at = max(at, absent)
