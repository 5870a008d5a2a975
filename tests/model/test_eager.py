"""Looking for a fault before going to sleep is bounded, and given up where nothing comes of it."""

from __future__ import annotations

import time

import pytest

from msharefsd.paging import eager
from msharefsd.paging.eager import IN_A_ROW, MOST_PAUSES, Eager

A_MOMENT = 3
"""So many looks."""


class Looks:
    """Reads, and counts how often."""

    def __init__(self) -> None:
        self._count = 0

    def nothing(self) -> list[int]:
        self._count += 1
        return []

    def something(self) -> list[int]:
        self._count += 1
        return [1]

    def taken(self) -> int:
        """How many since this was asked last."""
        count, self._count = self._count, 0
        return count


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def tick() -> float:
        now[0] += 1.01 * eager.MOMENT_SECONDS / A_MOMENT
        return now[0]

    monkeypatch.setattr(time, "perf_counter", tick)


def test_what_comes_is_found_but_not_for_ever() -> None:
    sharer, looks = Eager(), Looks()
    for _ in range(3):
        for _ in range(IN_A_ROW):
            assert sharer.look(looks.something) == [1]
        assert looks.taken() == IN_A_ROW
        assert not sharer.look(looks.something), "others have their turn"
        assert looks.taken() == 0


def left_out(sharer: Eager, looks: Looks) -> int:
    """How many times it does not look although something is there."""
    count = 0
    while not sharer.look(looks.something):
        count += 1
    assert looks.taken() == 1
    return count


@pytest.mark.parametrize("failures", [1, 2, 5, 14])
def test_where_nothing_comes_it_is_looked_more_seldom(failures: int) -> None:
    sharer, looks = Eager(), Looks()
    calls = 0
    for number in range(failures):
        assert not sharer.look(looks.nothing)
        assert looks.taken() == A_MOMENT
        pauses = min(2**number, MOST_PAUSES)
        if number < failures - 1:
            for _ in range(pauses):
                assert not sharer.look(looks.something)
            assert looks.taken() == 0
        calls = pauses
    assert left_out(sharer, looks) == calls
    assert not sharer.look(looks.nothing)
    assert looks.taken() == A_MOMENT
    assert left_out(sharer, looks) == 1, "something has come: it is as at the beginning"
