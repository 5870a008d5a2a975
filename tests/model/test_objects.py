"""The object map against a map of single pages."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from msharefsd.memory.files import MappedFile
from msharefsd.region.objects import Object, ObjectMap

PAGE = 4096
PAGES = 32
Page = tuple[int, bool, int, int]
"""What a page is part of: protection, private, file (0 for none), page of the file."""

starts = st.integers(0, PAGES - 1)
lengths = st.integers(1, 10)
protections = st.sampled_from([0, 1, 3])


class Maps(RuleBasedStateMachine):
    """The same changes to an ObjectMap and to a dictionary of pages."""

    def __init__(self) -> None:
        super().__init__()
        self.map = ObjectMap()
        self.pages: dict[int, Page] = {}
        self.files: list[MappedFile] = []

    def teardown(self) -> None:
        for file in self.files:
            file.let_go()

    @rule(start=starts, length=lengths, prot=protections, private=st.booleans())
    def insert(self, start: int, length: int, prot: int, private: bool) -> None:
        expected = self.gone(start, length)
        replaced = self.map.insert(Object(start * PAGE, length * PAGE, prot, private))
        assert sum(item.length for item in replaced) == expected * PAGE
        for page in range(start, start + length):
            self.pages[page] = (prot, private, 0, 0)

    @rule(start=starts, length=lengths, first=st.integers(0, 3), again=st.booleans())
    def insert_file(self, start: int, length: int, first: int, again: bool) -> None:
        if not (again and self.files):
            fd = os.open(os.devnull, os.O_RDONLY)
            self.files.append(MappedFile(fd, 0, may_write=False, close=os.close))
        file = self.files[-1]
        self.map.insert(Object(start * PAGE, length * PAGE, 1, False, file, first * PAGE))
        for page in range(start, start + length):
            self.pages[page] = (1, False, len(self.files), first + page - start)

    @rule(start=starts, length=lengths)
    def remove(self, start: int, length: int) -> None:
        expected = self.gone(start, length)
        removed = self.map.remove(start * PAGE, length * PAGE)
        assert sum(item.length for item in removed) == expected * PAGE
        for page in range(start, start + length):
            self.pages.pop(page, None)

    @rule(start=starts, length=lengths, prot=protections)
    def protect(self, start: int, length: int, prot: int) -> None:
        self.map.protect(start * PAGE, length * PAGE, prot)
        for page in range(start, start + length):
            if page in self.pages:
                self.pages[page] = (prot, *self.pages[page][1:])

    @rule(start=starts, length=lengths)
    def look(self, start: int, length: int) -> None:
        parts = self.map.within(start * PAGE, length * PAGE)
        assert dict(self.spread(parts)) == {
            page: what for page, what in self.pages.items() if start <= page < start + length
        }
        whole = all(page in self.pages for page in range(start, start + length))
        assert self.map.covers(start * PAGE, length * PAGE) == whole

    @rule(start=starts, length=lengths)
    def go_through(self, start: int, length: int) -> None:
        at, end, seen = start * PAGE, (start + length) * PAGE, []
        while (item := self.map.first(at, end)) is not None:
            seen.append(item)
            at = item.end
        assert seen == self.map.within(start * PAGE, length * PAGE)

    @invariant()
    def it_knows_its_files(self) -> None:
        files = {item.file for item in self.map if item.file is not None}
        assert set(self.map.files()) == files
        assert [self.map.uses(file) for file in self.files] == [
            file in files for file in self.files
        ]

    def gone(self, start: int, length: int) -> int:
        return sum(page in self.pages for page in range(start, start + length))

    def spread(self, items: list[Object]) -> Iterator[tuple[int, Page]]:
        for item in items:
            number = 1 + self.files.index(item.file) if item.file else 0
            for page in range(item.length // PAGE):
                at = item.file_offset // PAGE + page if item.file else 0
                yield item.offset // PAGE + page, (item.prot, item.private, number, at)

    @invariant()
    def they_are_the_same(self) -> None:
        items = list(self.map)
        assert dict(self.spread(items)) == self.pages
        assert len(items) == len(self.map)
        for before, after in itertools.pairwise(items):
            assert before.end <= after.offset
            assert before.end < after.offset or not before.merges_with(after)
        for page in range(PAGES + 10):
            found = self.map.find(page * PAGE + 1)
            assert (found is not None) == (page in self.pages)


TestMaps = Maps.TestCase


@pytest.mark.parametrize(
    ("prot", "private", "guarded"), [(3, True, False), (1, True, True), (0, False, True)]
)
def test_what_has_to_be_guarded(prot: int, private: bool, guarded: bool) -> None:
    assert Object(0, PAGE, prot, private).guarded == guarded
