"""The objects of a region: an ordered map of ranges, like an mm's VMAs.

Pure bookkeeping: nothing here touches memory.  All offsets and lengths are bytes
from the region's start, multiples of the page size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sortedcontainers import SortedDict


@dataclass(frozen=True, slots=True)
class Object:
    """A mapping inside a region: anonymous memory with a protection."""

    offset: int
    length: int
    prot: int
    """PROT_* bits of mmap(2)."""
    private: bool
    """Mapped MAP_PRIVATE: the same memory for all sharers nevertheless (the
    letter: "a write to a MAP_PRIVATE mapping will create a page which is shared
    between all the sharers"), so it only shows in `maps`."""

    @property
    def end(self) -> int:
        """The first byte after the object."""
        return self.offset + self.length

    def merges_with(self, other: Object) -> bool:
        """Whether the two are one object when they are neighbours."""
        return self.prot == other.prot and self.private == other.private


class ObjectMap:
    """Objects in order of their offsets; they never overlap."""

    def __init__(self) -> None:
        self._by_offset: SortedDict[int, Object] = SortedDict()

    def __len__(self) -> int:
        return len(self._by_offset)

    def __iter__(self) -> Iterator[Object]:
        return iter(self._by_offset.values())

    def find(self, offset: int) -> Object | None:
        """The object that has the byte at `offset`, or None for a hole."""
        at = self._by_offset.bisect_right(offset) - 1
        if at < 0:
            return None
        candidate: Object = self._by_offset.peekitem(at)[1]
        return candidate if offset < candidate.end else None

    def insert(self, new: Object) -> None:
        """Put an object in, in place of whatever it overlaps; merge with equal neighbours.

        What it overlaps is cut, as MAP_FIXED does with VMAs.
        """
        self.remove(new.offset, new.length)
        before = self.find(new.offset - 1) if new.offset else None
        if before is not None and before.merges_with(new):
            del self._by_offset[before.offset]
            new = replace(new, offset=before.offset, length=new.end - before.offset)
        after = self._by_offset.get(new.end)
        if after is not None and after.merges_with(new):
            del self._by_offset[after.offset]
            new = replace(new, length=after.end - new.offset)
        self._by_offset[new.offset] = new

    def remove(self, offset: int, length: int) -> None:
        """Make a hole; objects that stick out of it keep their outer parts."""
        end = offset + length
        first = self.find(offset)
        start = offset if first is None else first.offset
        for key in list(self._by_offset.irange(start, end, inclusive=(True, False))):
            old = self._by_offset.pop(key)
            if old.offset < offset:
                self._by_offset[old.offset] = replace(old, length=offset - old.offset)
            if old.end > end:
                self._by_offset[end] = replace(old, offset=end, length=old.end - end)
