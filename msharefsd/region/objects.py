"""The objects of a region: an ordered map of ranges, like an mm's VMAs.

Pure bookkeeping: nothing here touches memory.  All offsets and lengths are bytes
from the region's start, multiples of the page size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from sortedcontainers import SortedDict

from msharefsd.linux import syscalls
from msharefsd.memory.awaited import Awaited
from msharefsd.memory.files import MappedFile

MOST_OBJECTS: Final = 65530
"""As vm.max_map_count has it for a process (sysctl/vm: 65530)."""


@dataclass(frozen=True, slots=True)
class Object:
    """A mapping inside a region: anonymous memory, or a range of a file."""

    offset: int
    length: int
    prot: int
    """PROT_* bits of mmap(2)."""
    private: bool
    """Mapped MAP_PRIVATE: the same memory for all sharers nevertheless (the
    letter: "a write to a MAP_PRIVATE mapping will create a page which is shared
    between all the sharers"), but it never reaches a file."""
    file: MappedFile | None = None
    file_offset: int = 0
    """Of the object's first byte, in the file."""

    @property
    def end(self) -> int:
        """The first byte after the object."""
        return self.offset + self.length

    @property
    def accessible(self) -> bool:
        """Whether its memory can be touched at all."""
        return self.prot != syscalls.PROT_NONE

    @property
    def writable(self) -> bool:
        """Whether its memory can be written."""
        return bool(self.prot & syscalls.PROT_WRITE)

    @property
    def written_back(self) -> bool:
        """Whether what is written goes to a file."""
        return self.file is not None and self.file.takes_writes and not self.private

    @property
    def awaited(self) -> bool:
        """Whether somebody brings its contents, and they are not there yet."""
        return isinstance(self.file, Awaited)

    @property
    def guarded(self) -> bool:
        """Whether writes must be caught: not allowed, or to be written back."""
        return not self.writable or self.written_back

    def merges_with(self, after: Object) -> bool:
        """Whether this and its neighbour `after` are one object."""
        return (
            self.prot == after.prot
            and self.private == after.private
            and self.file is after.file
            and (self.file is None or self.file_offset + self.length == after.file_offset)
        )

    def part(self, start: int, end: int) -> Object:
        """The part of it that lies in [start, end)."""
        start, end = max(start, self.offset), min(end, self.end)
        file_offset = self.file_offset + start - self.offset if self.file else 0
        return replace(self, offset=start, length=end - start, file_offset=file_offset)


class ObjectMap:
    """Objects in order of their offsets; they never overlap."""

    def __init__(self) -> None:
        self._by_offset: SortedDict[int, Object] = SortedDict()
        self._uses: dict[MappedFile, int] = {}
        """How many objects each file has."""
        self._awaited = 0
        self.changed: set[int] = set()
        """Offsets at which an object begins, or does no more, that were not saved yet."""

    def __len__(self) -> int:
        return len(self._by_offset)

    def __iter__(self) -> Iterator[Object]:
        return iter(self._by_offset.values())

    def at(self, offset: int) -> Object | None:
        """The object that begins at `offset`."""
        found: Object | None = self._by_offset.get(offset)
        return found

    def _put(self, item: Object) -> None:
        self._by_offset[item.offset] = item
        self.changed.add(item.offset)
        self._awaited += item.length if item.awaited else 0
        if item.file is not None:
            self._uses[item.file] = self._uses.get(item.file, 0) + 1

    def _drop(self, offset: int) -> None:
        item = self._by_offset.pop(offset)
        self.changed.add(offset)
        self._awaited -= item.length if item.awaited else 0
        if item.file is not None:
            self._uses[item.file] -= 1
            if not self._uses[item.file]:
                del self._uses[item.file]

    def find(self, offset: int) -> Object | None:
        """The object that has the byte at `offset`, or None for a hole."""
        at = self._by_offset.bisect_right(offset) - 1
        if at < 0:
            return None
        candidate: Object = self._by_offset.peekitem(at)[1]
        return candidate if offset < candidate.end else None

    def first(self, start: int, end: int) -> Object | None:
        """The part of the first object in [start, end) that lies there.

        With it one goes from object to object while they change.
        """
        if start >= end:
            return None
        found = self.find(start)
        if found is None:
            offset = next(self._by_offset.irange(start, end, inclusive=(True, False)), None)
            if offset is None:
                return None
            found = self._by_offset[offset]
        return found.part(start, end)

    def past(self, start: int, end: int, count: int) -> int | None:
        """Where the object behind the first `count` in [start, end) begins, if there is one."""
        keys = self._by_offset.irange(start, end, inclusive=(True, False))
        found: int | None = next(itertools.islice(keys, count, None), None)
        return found

    def within(self, offset: int, length: int) -> list[Object]:
        """The parts of objects that lie in the range, in order."""
        if length <= 0:
            return []
        end = offset + length
        first = self.find(offset)
        start = offset if first is None else first.offset
        keys = self._by_offset.irange(start, end, inclusive=(True, False))
        return [self._by_offset[key].part(offset, end) for key in keys]

    def covers(self, offset: int, length: int) -> bool:
        """Whether the range has no hole."""
        end = offset + length
        while offset < end:
            found = self.find(offset)
            if found is None:
                return False
            offset = found.end
        return True

    def insert(self, new: Object) -> list[Object]:
        """Put an object in, in place of whatever it overlaps; merge with equal neighbours.

        What it overlaps is cut, as MAP_FIXED does with VMAs.  Returns what it replaced.
        """
        replaced = self.remove(new.offset, new.length)
        before = self.find(new.offset - 1) if new.offset else None
        if before is not None and before.merges_with(new):
            self._drop(before.offset)
            new = replace(before, length=new.end - before.offset)
        after = self._by_offset.get(new.end)
        if after is not None and new.merges_with(after):
            self._drop(after.offset)
            new = replace(new, length=after.end - new.offset)
        self._put(new)
        return replaced

    def remove(self, offset: int, length: int) -> list[Object]:
        """Make a hole; objects that stick out of it keep their outer parts.

        Returns what is gone.
        """
        end = offset + length
        removed = self.within(offset, length)
        for part in removed:
            old = self.find(part.offset)
            assert old is not None
            self._drop(old.offset)
            if old.offset < offset:
                self._put(old.part(old.offset, offset))
            if old.end > end:
                self._put(old.part(end, old.end))
        return removed

    def protect(self, offset: int, length: int, prot: int) -> list[Object]:
        """Give what lies in the range another protection.

        Returns the parts that had a different one, as they were.
        """
        changed = [item for item in self.within(offset, length) if item.prot != prot]
        for item in changed:
            self.insert(replace(item, prot=prot))
        return changed

    def uses(self, file: MappedFile) -> bool:
        """Whether any object is of that mapping of a file."""
        return file in self._uses

    def awaited(self) -> int:
        """How many bytes of it are still to be brought."""
        return self._awaited

    def files(self) -> Iterable[MappedFile]:
        """Each mapped file once."""
        return list(self._uses)
