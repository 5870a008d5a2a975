"""The page tables of one process, to the kilobyte.

The kernel counts a table of 4096 bytes for each 2 MiB in which a small page has an entry,
one of the next level for each GiB that has such a table or a huge page, and one for each
512 GiB above it.  An anonymous huge page has a table, too: it is kept for the day when the
page is split (pgtable_trans_huge_deposit(), mm/huge_memory.c); a shared one has none.

What PAGEMAP_SCAN does not show is a table whose pages have all been taken away
(MADV_DONTNEED); VmPTE counts it, so that is what is left over.  One of the middle level is left
of each GiB of which all has been collapsed, until the process touches it again: as many of these
as there can be are taken for what is left over.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from msharetables import proc
from msharetables.calls import HUGE_PAGE, TABLE
from msharetables.objects import COLLAPSIBLE, Kernel, Key, key
from msharetables.pagemap import FILE, HUGE, Pagemap
from msharetables.proc import Vma

_MIDDLE: Final = 1 << 30
_UPPER: Final = 1 << 39
_ALWAYS_THERE: Final = frozenset({b"[vvar]", b"[vvar_vclock]"})
"""The kernel's own pages: PAGEMAP_SCAN passes over them (VM_PFNMAP)."""


@dataclass(slots=True)
class Part:
    """What a process has of one object."""

    size: int = 0
    """Of its mappings of it (bytes)."""
    vmas: list[Vma] = field(default_factory=list)
    congruent: bool = False
    """Whether a mapping's address and offset agree modulo 2 MiB, so that it can have huge pages."""
    tables: int = 0
    """Tables of small pages."""
    huge: int = 0
    """Huge pages that are mapped as such (bytes)."""
    small: list[tuple[Vma, int, int]] = field(default_factory=list)
    """Runs of 2 MiB slots that have tables: the mapping, the first address, the last one's end."""
    middle: dict[int, int] = field(default_factory=dict)
    """hugetlb: the first page's address in each GiB in which it has any."""

    def reclaimable(self) -> int:
        """How many of the tables would go if what is congruent were huge pages."""
        total = 0
        for vma, start, end in self.small:
            if is_congruent(vma):
                low, high = whole(vma, start, end)
                total += max(high - low, 0) // HUGE_PAGE
        return total


@dataclass(slots=True)
class Tables:
    """One process; counts of tables of TABLE bytes."""

    small: int = 0
    """Of small pages, all of them."""
    middle: int = 0
    upper: int = 0
    shared: int = 0
    """Those of `small` that are for shared mappings."""
    hollow: int = 0
    """How many of the middle level there may be that have nothing in them."""
    parts: dict[Key, Part] = field(default_factory=dict)
    names: dict[Key, Vma] = field(default_factory=dict)
    """A mapping of each object, for its name."""

    @property
    def bytes(self) -> int:
        """What VmPTE should say."""
        return (self.small + self.middle + self.upper) * TABLE

    def fit(self, vmpte: int) -> None:
        """Take into account what VmPTE (bytes) shows and PAGEMAP_SCAN does not."""
        found = max(0, min((vmpte - self.bytes) // TABLE, self.hollow))
        self.middle += found
        self.hollow -= found


def is_congruent(vma: Vma) -> bool:
    """Whether huge pages fit in a mapping of a file."""
    return (vma.start - vma.offset) % HUGE_PAGE == 0


def whole(vma: Vma, start: int, end: int) -> tuple[int, int]:
    """The chunks of 2 MiB in [start, end), multiples of that, that a mapping has as a whole."""
    return max(start, vma.start + -vma.start % HUGE_PAGE), min(end, vma.end - vma.end % HUGE_PAGE)


def count(pid: int | str, kernel: Kernel) -> Tables:
    """Look at one process.  Raises OSError; waits for its mmap_lock."""
    kernel.see(pid)
    space = proc.namespace(pid, "ipc")
    vmas = list(proc.maps(pid))
    with Pagemap(pid) as pagemap:
        return _Count(vmas, kernel, space).walk(pagemap)


def count_shared(pid: int | str, kernel: Kernel, smallest: int) -> Tables:
    """Look only at shared memory that can be huge pages, objects of `smallest` bytes and more.

    For who looks often.  Raises OSError; waits for the process's mmap_lock.
    """
    kernel.see(pid)
    vmas = [
        vma
        for vma in proc.maps(pid)
        if vma.shared and vma.size >= smallest and kernel.kind(vma) in COLLAPSIBLE
    ]
    if not vmas:
        return Tables()
    with Pagemap(pid) as pagemap:
        return _Count(vmas, kernel, proc.namespace(pid, "ipc")).walk_each(pagemap)


class _Count:
    """Goes through an address space once, upwards."""

    def __init__(self, vmas: Sequence[Vma], kernel: Kernel, space: str) -> None:
        self._vmas = vmas
        self._ends = [vma.end for vma in vmas]
        self._kernel = kernel
        self._tables = Tables()
        self._of: dict[int, tuple[Part, bool]] = {}
        self._may_be_hollow: set[int] = set()
        self._last = self._last_middle = self._last_upper = -1
        for number, vma in enumerate(vmas):
            if not vma.shared or not vma.inode:
                continue
            of = key(vma, space)
            part = self._tables.parts.setdefault(of, Part())
            self._tables.names.setdefault(of, vma)
            part.size += vma.size
            part.vmas.append(vma)
            part.congruent |= is_congruent(vma)
            self._of[number] = part, vma.device in kernel.huge
            if is_congruent(vma) and kernel.kind(vma) in COLLAPSIBLE:
                self._may_be_hollow.add(number)
                self._tables.hollow += (vma.end - 1) // _MIDDLE - vma.start // _MIDDLE + 1

    def walk(self, pagemap: Pagemap) -> Tables:
        """Count.  Raises OSError."""
        if not self._vmas:
            return self._tables
        always = [vma for vma in self._vmas if vma.path in _ALWAYS_THERE]
        for start, stop, bits in pagemap.slots(self._vmas[0].start, max(self._ends)):
            while always and always[0].start < start:
                vma = always.pop(0)
                self._found(vma.start, vma.end, 0)
            self._found(start, stop, bits)
        for vma in always:
            self._found(vma.start, vma.end, 0)
        return self._tables

    def walk_each(self, pagemap: Pagemap) -> Tables:
        """Count in these mappings alone.  Raises OSError."""
        for vma in self._vmas:
            for start, stop, bits in pagemap.slots(vma.start, vma.end):
                self._found(start, stop, bits)
        return self._tables

    def _found(self, start: int, end: int, bits: int) -> None:
        """What one run is of: it may go over several mappings."""
        number = bisect.bisect_right(self._ends, start)
        while number < len(self._vmas) and self._vmas[number].start < end:
            vma = self._vmas[number]
            low, high = max(start, vma.start), min(end, vma.end)
            before = self._tables.middle
            if bits & HUGE:
                self._huge(number, vma, low, high, bits)
            else:
                self._small(number, vma, low, high)
            if number in self._may_be_hollow:
                self._tables.hollow -= self._tables.middle - before
            number += 1

    def _small(self, number: int, vma: Vma, start: int, end: int) -> None:
        first = max(start // HUGE_PAGE, self._last + 1)
        last = (end - 1) // HUGE_PAGE
        if last < first:
            return
        self._last = last
        tables = last + 1 - first
        self._tables.small += tables
        self._above(start, end)
        if number in self._of:
            part, _ = self._of[number]
            part.tables += tables
            low, high = first * HUGE_PAGE, (last + 1) * HUGE_PAGE
            if part.small and part.small[-1][0] is vma and part.small[-1][2] == low:
                low = part.small.pop()[1]
            part.small.append((vma, low, high))
            self._tables.shared += tables

    def _huge(self, number: int, vma: Vma, start: int, end: int, bits: int) -> None:
        page = self._kernel.huge.get(vma.device) if vma.inode else None
        if page is None or page < _MIDDLE:
            self._above(start, end)
        else:
            self._upper(start, end)
        if number in self._of:
            part, hugetlb = self._of[number]
            part.huge += end - start
            if hugetlb and page is not None and page < _MIDDLE:
                for middle in range(start // _MIDDLE, (end - 1) // _MIDDLE + 1):
                    part.middle.setdefault(middle, max(start, middle * _MIDDLE))
        elif page is None and not bits & FILE:
            self._tables.small += (end - start) // HUGE_PAGE

    def _above(self, start: int, end: int) -> None:
        first = max(start // _MIDDLE, self._last_middle + 1)
        last = (end - 1) // _MIDDLE
        if last >= first:
            self._tables.middle += last + 1 - first
            self._last_middle = last
            self._upper(start, end)

    def _upper(self, start: int, end: int) -> None:
        first = max(start // _UPPER, self._last_upper + 1)
        last = (end - 1) // _UPPER
        if last >= first:
            self._tables.upper += last + 1 - first
            self._last_upper = last
