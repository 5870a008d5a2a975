"""Which pages are dirty, and into which file each goes.

By file, because that is how they are written: what one file has to do with is what of
that file is dirty, whatever else is mapped and written to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sortedcontainers import SortedDict, SortedSet

from msharefsd.memory.files import MappedFile
from msharefsd.paging.window import Window
from msharefsd.threads.breath import Breath


@dataclass(slots=True)
class _Page:
    file: MappedFile
    writers: set[Window]


class Dirty:
    """The dirty pages of one region, by their offsets."""

    def __init__(self) -> None:
        self._pages: SortedDict[int, _Page] = SortedDict()
        self._of: dict[MappedFile, SortedSet[int]] = {}
        self.writing: dict[MappedFile, tuple[int, int]] = {}
        """What is on its way to each file just now: [start, end), not dirty any more."""

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, page: int) -> bool:
        return page in self._pages

    def add(self, page: int, file: MappedFile, windows: Iterable[Window] = ()) -> None:
        """It is to be written to the file; `windows` may write it without our noticing."""
        known = self._pages.get(page)
        if known is not None and known.file is file:
            known.writers.update(windows)
            return
        self.discard(page)
        self._pages[page] = _Page(file, set(windows))
        self._of.setdefault(file, SortedSet()).add(page)

    def discard(self, page: int) -> None:
        """It is not dirty any more."""
        known = self._pages.pop(page, None)
        if known is not None:
            pages = self._of[known.file]
            pages.discard(page)
            if not pages:
                del self._of[known.file]

    def writers(self, page: int) -> set[Window]:
        """Who may write a dirty page without our noticing."""
        known: _Page = self._pages[page]
        return known.writers

    def of(self, file: MappedFile, start: int, end: int) -> Iterator[int]:
        """The file's dirty pages in [start, end), in order."""
        return iter(self._of.get(file, SortedSet()).irange(start, end, inclusive=(True, False)))

    def file_at(self, start: int, end: int) -> tuple[int, MappedFile] | None:
        """The first dirty page in [start, end), and its file."""
        page = next(self._pages.irange(start, end, inclusive=(True, False)), None)
        return None if page is None else (page, self._pages[page].file)

    @property
    def lost(self) -> bool:
        """Whether there are dirty pages, and nothing that any of them could be written to."""
        return bool(self._of) and all(file.lost for file in self._of)

    def files(self) -> list[MappedFile]:
        """The files that have dirty pages."""
        return list(self._of)

    def busy(self, start: int, end: int) -> list[MappedFile]:
        """The files to which some of [start, end) is on its way."""
        return [file for file, (low, high) in self.writing.items() if low < end and start < high]

    async def concerned(self, start: int, end: int, page: int) -> list[MappedFile]:
        """The files that have something of [start, end) dirty, or on its way.

        `page`: the size of one.  Costs no more than there are files with dirty pages, or
        pages in the range.
        """
        found = dict.fromkeys(self.busy(start, end))
        breath = Breath()
        if len(self._of) <= (end - start) // page:
            for file in self.files():
                if next(self.of(file, start, end), None) is not None:
                    found[file] = None
                await breath.take()
        else:
            while (first := self.file_at(start, end)) is not None:
                found[first[1]] = None
                start = first[0] + page
                await breath.take()
        return list(found)
