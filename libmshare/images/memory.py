"""What is in a region that is to be pushed: which parts of it are contents.

To look at a page that is not there yet makes one, so an empty region would be filled by being
looked at.  Where nobody else can write, what there is can be told from the region's memory
itself, of which this process has a descriptor: a read of it makes no page, and SEEK_DATA finds
what is there, on disk (swap) too, which mincore(2) does not.  Elsewhere, and in files, whose
pages come when they are touched, it is read through the window.

(Where others can write it may be that a page is hidden for a moment, because one of them
touches what it may not: see paging/violation.py.  The window waits for it.)
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self

from libmshare import texts, touching, waiting
from libmshare.errors import Busy, ImageError
from libmshare.images.manifest import PAGE, PART, Object
from libmshare.images.told import Told

if TYPE_CHECKING:
    from libmshare.region import Region

WORTH_IT: Final = 512 << 10
"""Smaller holes are stored, as zeros (bytes)."""
_READ: Final = mmap.PROT_READ
_WRITE: Final = mmap.PROT_WRITE


class Contents:
    """The contents of a region, for as long as nobody changes them."""

    def __init__(self, region: Region, *, unsynchronized: bool) -> None:
        """Raises Busy if others may write it, unless that is wanted; ImageError; OSError."""
        self._region = region
        self._unsynchronized = unsynchronized
        self._told = waiting.interruptible(partial(Told, region))
        self._maps = self._look()
        self.backing = waiting.interruptible(self._told.pages)[0]
        if any(map(texts.is_awaited, self._maps)):
            raise Busy(errno.EBUSY, "it is not filled yet: see Region.wait_filled()", region.name)
        self.objects = tuple(self._object(each) for each in self._maps)
        self._alone = not self._writers()
        frozen = all(not each.prot & _WRITE for each in self.objects)
        if not (self._alone or frozen or unsynchronized):
            raise Busy(errno.EBUSY, "other processes have it attached for writing", region.name)
        self._files = [each["inode"] != 0 for each in self._maps]
        self._fd = _memory_of(region.start) if self._alone else -1

    def close(self) -> None:
        """Twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what the daemon says --

    def _look(self) -> list[dict[str, Any]]:
        return waiting.interruptible(self._told.maps)

    def _writers(self) -> bool:
        """Whether another process may write it."""
        sharers = waiting.interruptible(self._told.sharers)
        return any(each.access == "read-write" and each.pid != os.getpid() for each in sharers)

    def _object(self, line: dict[str, Any]) -> Object:
        letters = line["permissions"]
        start, length = line["start"] - self._region.start, line["end"] - line["start"]
        if letters[0] != "r":
            raise ImageError(
                errno.EACCES,
                f"what is mapped at {line['start']:#x} may be read by nobody",
                self._region.name,
            )
        if start >= self._region.size:
            raise ImageError(errno.EINVAL, "something is mapped beyond its size", self._region.name)
        # (Where pages are large it may end in the middle of one.)
        length = min(length, -(-(self._region.size - start) // PAGE) * PAGE)
        prot = _READ | (_WRITE if letters[1] == "w" else 0)
        return Object(start, length, prot, letters[3] == "s")

    def check(self) -> None:
        """Raises Busy if it may have changed since the beginning."""
        if self._unsynchronized:
            return
        if self._look() != self._maps or (self._alone and self._writers()):
            raise Busy(errno.EBUSY, "it was changed meanwhile", self._region.name)

    # -- what is in it --

    def runs(self) -> Iterator[tuple[int, int, bool]]:
        """Offset and length of what may have contents, and whether it is to be touched."""
        for each, is_file in zip(self.objects, self._files, strict=True):
            end = min(each.offset + each.length, self._region.size)
            if self._fd < 0 or is_file:
                parts = [(each.offset, end)]
            else:
                parts = list(_data(self._fd, each.offset, end))
            for low, high in parts:
                cuts = [low, *range((low // PART + 1) * PART, high, PART), high]
                for at, behind in itertools.pairwise(cuts):
                    yield at, behind - at, self._fd < 0 or is_file

    def read(self, offset: int, length: int, *, touch: bool) -> bytes:
        """The contents of a part of it.  Raises OSError."""
        if touch:
            region, address = self._region, self._region.start + offset
            pin, root = region.pin(offset, length), region.identity.root
            touching.populate(pin, address, length, None, root, region.name)
            return bytes(self._region.buf[offset : offset + length])
        pieces = bytearray()
        while len(pieces) < length:
            piece = os.pread(self._fd, length - len(pieces), offset + len(pieces))
            if not piece:
                raise ImageError(errno.EIO, "its memory ends before it does", self._region.name)
            pieces += piece
        return bytes(pieces)


def _data(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Where in [start, end) of a file there is data, small holes included."""
    low = high = start
    while high < end:
        try:
            begin = os.lseek(fd, high, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            if error.errno != errno.EINVAL:
                raise
            yield start, end  # hugetlbfs does not know; to read it makes no page there either
            return
        if begin >= end:
            break
        if begin - high > WORTH_IT or high == low:
            if high > low:
                yield low, high
            low = begin
        high = min(os.lseek(fd, begin, os.SEEK_HOLE), end)
    if high > low:
        yield low, high


def _memory_of(address: int) -> int:
    """A descriptor of the memory that is mapped there; -1 if this process has lost its own.

    Only what has the memory's name is looked at: fstat(2) asks the server of any other file.
    """
    wanted, path = None, ""
    with open("/proc/self/maps", errors="surrogateescape") as file:
        for line in file:
            words = line.split(None, 5)
            low, high = (int(word, 16) for word in words[0].split("-"))
            if low <= address < high:
                major, minor = (int(word, 16) for word in words[3].split(":"))
                wanted = os.makedev(major, minor), int(words[4])
                path = words[5].rstrip("\n") if len(words) > 5 else ""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") != path:
                continue
            copy = os.dup(int(name))
            status = os.fstat(copy)
            if (status.st_dev, status.st_ino) == wanted:
                return copy
            os.close(copy)
    return -1
