"""How long regions live."""

from __future__ import annotations

import errno
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from both import Both
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from msharefsd.errors import Refused
from msharefsd.link.messages import Emptied, Gone, Unlink
from msharefsd.mount.names import check_name
from msharefsd.region.region import Region, Sharer, State

ALIGNMENT = 1 << 21


class Backings:
    """Backings that only count."""

    def __init__(self) -> None:
        self.open: set[int] = set()

    def make(self, number: int, start: int, size: int, kind: str) -> Any:
        assert number not in self.open, "a region has one backing"
        self.open.add(number)
        return SimpleNamespace(
            kind="shm",
            name=f"/{number}",
            fd=-1,
            identity=SimpleNamespace(major=1, minor=2, inode=number),
            release=lambda: self.open.remove(number),
            allocated=lambda: size,
        )


@pytest.fixture
def backings() -> Backings:
    return Backings()


@pytest.fixture
def regions(backings: Backings) -> Both:
    return Both(ALIGNMENT, backings.make)


def live(regions: Both, name: bytes = b"r", uid: int = 1000) -> Region:
    region = regions.create(name, 0o600, uid, uid)
    regions.make(region, ALIGNMENT, ALIGNMENT, read_only=False)
    regions.commit(region)
    return region


def attach(
    regions: Both, region: Region, uid: int = 1000, ended: Callable[[], bool] = lambda: False
) -> Sharer:
    return regions.attach(region, 1, uid, -1, writable=True, ended=ended)


def test_a_region_lives_as_long_as_it_has_a_name_or_a_sharer(
    regions: Both, backings: Backings
) -> None:
    region = live(regions)
    sharer = attach(regions, region)
    regions.unlink(region)
    assert regions.find(b"r") is None
    assert backings.open == {region.id}
    assert regions.of_backing(1, 2, region.id) is region
    regions.detach(sharer)
    assert region.state is State.GONE
    assert backings.open == set()
    assert regions.with_id(region.id) is None
    assert regions.of_backing(1, 2, region.id) is None


def test_the_end_of_the_last_sharer_leaves_the_name(regions: Both, backings: Backings) -> None:
    region = live(regions)
    regions.detach(attach(regions, region))
    assert region.state is State.LIVE
    assert backings.open == {region.id}


@pytest.mark.parametrize(("uid", "goes"), [(0, True), (1000, True), (1001, False)])
def test_the_last_sharers_unlink_takes_the_name_if_it_may(
    regions: Both, uid: int, goes: bool
) -> None:
    region = live(regions)
    regions.detach_and_unlink(attach(regions, region, uid))
    assert (regions.find(b"r") is None) == goes


def test_unlink_counts_only_sharers_that_still_run(regions: Both) -> None:
    region = live(regions)
    attach(regions, region, ended=lambda: True)
    other = attach(regions, region)
    regions.detach_and_unlink(attach(regions, region))
    assert regions.find(b"r") is region
    regions.detach_and_unlink(other)
    assert regions.find(b"r") is None


@pytest.mark.parametrize("drop", [True, False])
def test_a_donor_that_gives_up(regions: Both, backings: Backings, drop: bool) -> None:
    region = regions.create(b"r", 0o600, 0, 0)
    regions.make(region, ALIGNMENT, ALIGNMENT, read_only=True, made_file=drop)
    assert region.state is State.BUILDING
    settled = region.settled
    regions.abandon(region)
    assert settled.is_set()
    assert backings.open == set()
    assert region.state is (State.GONE if drop else State.FILE)
    assert (regions.find(b"r") is None) == drop


def test_a_name_that_is_being_taken_away_is_given_to_nobody(
    regions: Both, backings: Backings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the front hands over crosses with what it is asked to do."""
    region = regions.create(b"r", 0o600, 0, 0)
    regions.make(region, ALIGNMENT, ALIGNMENT, read_only=False, made_file=True)
    record, told = region.record(), list[Emptied | Gone | Unlink]()
    monkeypatch.setattr(regions, "_tell", told.append)
    regions.abandon(region)
    again = regions.learn(record)
    assert regions.is_going(again.id)
    assert not again.linked
    for message in told:
        regions._hear(message)
    assert not regions.is_going(again.id)
    assert regions.find(b"r") is None
    assert backings.open == set()


def test_a_region_that_has_no_name_is_given_one(regions: Both, backings: Backings) -> None:
    region = regions.create(b"temporary", 0o600, 0, 0)
    regions.make(region, ALIGNMENT, ALIGNMENT, read_only=False, made_file=True)
    regions.commit(region)
    sharer = attach(regions, region)
    regions.unlink(region)
    before = region.record()
    name = regions.names.with_id(region.id)
    assert name is not None and not region.linked
    regions.names.give(name, b"r")
    assert regions.learn(before) is region  # a connection that was handed over before
    assert region.linked and region.name == b"r"
    for other in (b"r", b"s"):  # it has a name now
        with pytest.raises(Refused):
            regions.names.give(name, other)
    regions.detach(sharer)
    assert regions.find(b"r") is region and regions.find(b"temporary") is None
    regions.unlink(region)
    assert backings.open == set()


def test_a_region_that_ends_while_it_is_given_a_name_leaves_none(
    regions: Both, backings: Backings, monkeypatch: pytest.MonkeyPatch
) -> None:
    region = regions.create(b"temporary", 0o600, 0, 0)
    regions.make(region, ALIGNMENT, ALIGNMENT, read_only=False, made_file=True)
    regions.commit(region)
    sharer = attach(regions, region)
    regions.unlink(region)
    name = regions.names.with_id(region.id)
    assert name is not None
    told = list[Emptied | Gone | Unlink]()
    monkeypatch.setattr(regions, "_tell", told.append)
    regions.detach(sharer)  # its pager says so, and hears later of the name
    regions.names.give(name, b"r")
    for message in told:
        regions._hear(message)
    assert regions.find(b"r") is None and regions.names.find(b"r") is None
    assert regions.names.with_id(region.id) is None
    assert backings.open == set()


def test_a_name_that_was_removed_while_the_region_was_built(
    regions: Both, backings: Backings
) -> None:
    region = regions.create(b"r", 0o600, 0, 0)
    regions.make(region, ALIGNMENT, ALIGNMENT, read_only=False, made_file=True)
    regions.unlink(region)
    assert backings.open == {region.id}
    regions.abandon(region)
    assert region.state is State.GONE
    assert backings.open == set()


@pytest.mark.parametrize(
    ("name", "code"),
    [(b".x", errno.EPERM), (b"mshare_info", errno.EPERM), (b"x" * 256, errno.ENAMETOOLONG)],
)
def test_names_that_no_region_can_have(name: bytes, code: int) -> None:
    with pytest.raises(Refused) as caught:
        check_name(name)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("start", "size"),
    [
        (ALIGNMENT, 0),
        (0, ALIGNMENT),
        (ALIGNMENT + 1, ALIGNMENT),
        (ALIGNMENT, ALIGNMENT + 1),
        ((1 << 47) - ALIGNMENT, 2 * ALIGNMENT),
        (1 << 63, 1 << 63),
    ],
)
def test_ranges_that_no_region_can_have(regions: Both, start: int, size: int) -> None:
    with pytest.raises(Refused) as caught:
        regions.check_range(start, size)
    assert caught.value.code == errno.EINVAL


def test_names_are_one_regions_and_ids_are_never_used_again(regions: Both) -> None:
    first = live(regions)
    with pytest.raises(Refused) as caught:
        regions.create(b"r", 0o600, 0, 0)
    assert caught.value.code == errno.EEXIST
    regions.unlink(first)
    assert regions.create(b"r", 0o600, 0, 0).id != first.id


def test_a_label_is_printable_and_on_one_line() -> None:
    name = b"a b\n\xff\\\xc2\x85\xc3\xa4"
    region = Both(ALIGNMENT, Backings().make).create(name, 0o600, 0, 0)
    assert region.label() == "a\\040b\\012\\377\\134\\302\\205ä"


class Lives(RuleBasedStateMachine):
    """Whatever happens in whatever order, memory is held exactly as long as it must be."""

    def __init__(self) -> None:
        super().__init__()
        self.backings = Backings()
        self.regions = Both(ALIGNMENT, self.backings.make)
        self.all: list[Region] = []
        self.sharers: list[Sharer] = []

    def some(self, number: int) -> Region:
        return self.all[number % len(self.all)]

    @rule(name=st.sampled_from([b"a", b"b", b"c"]))
    def create(self, name: bytes) -> None:
        if self.regions.find(name) is None:
            self.all.append(self.regions.create(name, 0o600, 0, 0))

    @precondition(lambda self: self.all)
    @rule(number=st.integers(0, 9), made=st.booleans())
    def establish(self, number: int, made: bool) -> None:
        region = self.some(number)
        if region.state is State.FILE and region.linked:
            self.regions.make(region, ALIGNMENT, ALIGNMENT, read_only=False, made_file=made)

    @precondition(lambda self: self.all)
    @rule(number=st.integers(0, 9), gives_up=st.booleans())
    def settle(self, number: int, gives_up: bool) -> None:
        region = self.some(number)
        if region.state is State.BUILDING:
            if gives_up:
                self.regions.abandon(region)
            else:
                self.regions.commit(region)
                self.sharers.append(attach(self.regions, region))

    @precondition(lambda self: self.all)
    @rule(number=st.integers(0, 9))
    def join(self, number: int) -> None:
        region = self.some(number)
        if region.state is State.LIVE:
            self.sharers.append(attach(self.regions, region))

    @precondition(lambda self: self.sharers)
    @rule(number=st.integers(0, 9), unlink=st.booleans())
    def leave(self, number: int, unlink: bool) -> None:
        sharer = self.sharers.pop(number % len(self.sharers))
        (self.regions.detach_and_unlink if unlink else self.regions.detach)(sharer)

    @precondition(lambda self: self.all)
    @rule(number=st.integers(0, 9))
    def remove(self, number: int) -> None:
        region = self.some(number)
        if region.linked:
            self.regions.unlink(region)

    @invariant()
    def memory_is_held_as_long_as_it_must_be(self) -> None:
        used = {sharer.region.id for sharer in self.sharers}
        for region in self.all:
            ranged = region.state in (State.BUILDING, State.LIVE)
            assert (region.id in self.backings.open) == ranged
            wanted = region.linked or region.id in used or region.state is State.BUILDING
            assert (region.state is State.GONE) == (not wanted)

    def teardown(self) -> None:
        self.regions.close()
        assert self.backings.open == set()


TestLives = Lives.TestCase
