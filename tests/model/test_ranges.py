"""Ranges are a set of bytes; and what they cost does not grow with their number."""

from __future__ import annotations

import itertools
import sys
from types import FrameType
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sortedcontainers import SortedDict

from msharefsd.region.ranges import Ranges

SIZE = 40
places = st.integers(0, SIZE)


def bytes_of(ranges: list[tuple[int, int]]) -> set[int]:
    return {at for start, end in ranges for at in range(start, end)}


class Model(RuleBasedStateMachine):
    """Against a plain set of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges = Ranges()
        self.model: set[int] = set()

    @rule(start=places, end=places)
    def add(self, start: int, end: int) -> None:
        self.ranges.add(start, end)
        self.model |= set(range(start, end))

    @rule(start=places, end=places)
    def remove(self, start: int, end: int) -> None:
        self.ranges.remove(start, end)
        self.model -= set(range(start, end))

    @rule()
    def clear(self) -> None:
        self.ranges.clear()
        self.model.clear()

    @rule(start=places, end=places)
    def ask(self, start: int, end: int) -> None:
        asked = set(range(start, end))
        within, gaps = list(self.ranges.within(start, end)), list(self.ranges.gaps(start, end))
        assert bytes_of(within) == self.model & asked
        assert bytes_of(gaps) == asked - self.model
        assert sorted([*within, *gaps]) == sorted(set(within) | set(gaps))
        assert self.ranges.covers(start, end) == (asked <= self.model)
        here = {(low, high) for low, high in self.ranges if low <= end and start <= high}
        if start < end:
            assert set(self.ranges.touching(start, end)) == here

    @invariant()
    def they_are_the_same(self) -> None:
        found = list(self.ranges)
        assert bytes_of(found) == self.model
        assert self.ranges.length == len(self.model)
        assert len(self.ranges) == len(found)
        assert bool(self.ranges) == bool(self.model)
        assert all(start < end for start, end in found)
        assert all(before[1] < after[0] for before, after in itertools.pairwise(found))

    @invariant()
    def each_byte_is_found(self) -> None:
        for at in range(-1, SIZE + 2):
            assert self.ranges.contains(at) == (at in self.model)
            here = self.ranges.find(at)
            assert here is None or (here[0] <= at < here[1] and here in list(self.ranges))


TestModel = Model.TestCase


@given(st.integers(0, 4999))
def test_one_more_costs_no_more_than_the_logarithm_of_what_is_there(place: int) -> None:
    ranges = Ranges()
    ranges._ends = SortedDict({number * 4: number * 4 + 1 for number in range(5000)})
    lines = 0

    def count(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        ranges.add(place * 4 + 2, place * 4 + 3)
        assert ranges.contains(place * 4 + 2)
        assert list(ranges.within(place * 4, place * 4 + 4)) == [
            (place * 4, place * 4 + 1),
            (place * 4 + 2, place * 4 + 3),
        ]
        ranges.remove(place * 4 + 2, place * 4 + 3)
    finally:
        sys.settrace(before)
    assert lines < 1000  # a walk over all of them takes many thousands


def test_ranges_merge_where_they_touch() -> None:
    ranges = Ranges()
    ranges.add(10, 20)
    ranges.add(30, 40)
    ranges.add(12, 20)
    assert list(ranges) == [(10, 20), (30, 40)]
    ranges.add(20, 30)
    assert list(ranges) == [(10, 40)]
    assert repr(ranges) == "Ranges([(10, 40)])"
