"""What belongs in a region of which somebody untrusted can read, and what does not."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from both import Both
from conftest import ALIGNMENT

from msharefsd.journal.journal import Journal
from msharefsd.linux import syscalls
from msharefsd.memory import names
from msharefsd.memory.backing import Backing
from msharefsd.memory.files import MappedFile
from msharefsd.memory.shmbacking import ShmBacking
from msharefsd.paging.watch import Watch
from msharefsd.region.objects import Object
from msharefsd.region.ranges import Ranges
from msharefsd.region.region import Region
from msharefsd.threads.disposal import Disposal

PAGE = syscalls.PAGE
READ, WRITE, NONE = syscalls.PROT_READ, syscalls.PROT_WRITE, syscalls.PROT_NONE
FILE, MEMORY, HIDDEN, HOLE = 0, 16, 32, 48
"""Where things are, in pages; 16 of each."""
SIZE = ALIGNMENT


class Stage:
    """A region with everything in it, and who would watch it."""

    def __init__(self, region: Region, journal: Journal) -> None:
        self.region = region
        self.journal = journal
        self.counted = 0
        self.watch = self.another()
        assert region.backing is not None
        self.backing: Backing = region.backing
        journal.watch(region.id, [])
        self.watch.judging = True

    def another(self) -> Watch:
        """As another pager would have it."""

        def count(pages: int) -> None:
            self.counted += pages

        return Watch(self.region, self.journal, count)

    def write(self, page: int, content: bytes) -> None:
        os.pwrite(self.backing.fd, content * PAGE, page * PAGE)

    def put(self, page: int) -> None:
        """A page of the file comes as it should."""
        self.write(page, b"F")
        self.watch.add(page * PAGE, (page + 1) * PAGE)

    def here(self) -> list[int]:
        return [
            at // PAGE
            for start, end in self.backing.data(0, SIZE)
            for at in range(start, end, PAGE)
        ]

    def stashed(self) -> dict[int, bytes]:
        stash = self.backing.stash
        if stash is None:
            return {}
        return {
            at // PAGE: os.pread(stash.fd, 1, at)
            for start, end in stash.data(0, SIZE)
            for at in range(start, end, PAGE)
        }


@pytest.fixture
def stage(directory: Path) -> Iterator[Stage]:
    disposal = Disposal()
    memory = names.Mark(Path(f"/test-{os.getpid()}"), "0", 0).new()
    regions = Both(ALIGNMENT, lambda *_: ShmBacking(memory, SIZE, disposal))
    path = directory / "file"
    path.write_bytes(b"F" * 16 * PAGE)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        region = regions.create(b"r", 0o600, 0, 0)
        regions.make(region, ALIGNMENT, SIZE, read_only=False)
        regions.commit(region)
        file = MappedFile(fd, 0, may_write=True, close=os.close)
        for at, prot, of in (
            (FILE, READ | WRITE, file),
            (MEMORY, READ, None),
            (HIDDEN, NONE, None),
        ):
            region.objects.insert(Object(at * PAGE, 16 * PAGE, prot, private=True, file=of))
        yield Stage(region, regions.journal)
    finally:
        regions.close()
        disposal.close()


def written(stage: Stage) -> list[tuple[int, int]]:
    return sorted(stage.journal.put(stage.region.id))


def test_what_was_put_is_written_down_as_it_is_known(stage: Stage) -> None:
    dice = random.Random(7)
    model: set[int] = set()
    for _ in range(300):
        first, last = sorted(dice.sample(range(17), 2))
        if dice.random() < 0.5:
            stage.watch.add(first * PAGE, last * PAGE)
            model.update(range(first, last))
        else:
            stage.watch.write_gone([(first * PAGE, last * PAGE)])
            stage.watch.forget(first * PAGE, last * PAGE)
            model.difference_update(range(first, last))
        assert written(stage) == list(stage.watch.put)
        assert {at for at in range(17) if stage.watch.put.contains(at * PAGE)} == model


def test_several_ranges_go_at_one_time(stage: Stage) -> None:
    stage.watch.add(0, 16 * PAGE)
    gone = [(PAGE, 2 * PAGE), (4 * PAGE, 6 * PAGE), (15 * PAGE, 20 * PAGE)]
    stage.watch.write_gone(gone)
    for each in gone:
        stage.watch.forget(*each)
    assert written(stage) == list(stage.watch.put)
    assert len(stage.watch.put) == 3


def test_what_does_not_belong_is_taken_out_and_counted(stage: Stage) -> None:
    stage.put(FILE)
    for page in (FILE + 1, MEMORY, HIDDEN, HOLE, HOLE + 100):
        stage.write(page, b"\0")
    stage.backing.copy_to_stash([((MEMORY + 1) * PAGE, (MEMORY + 2) * PAGE)])
    os.pwrite(stage.backing.stash.fd, b"s" * PAGE, (MEMORY + 2) * PAGE)  # type: ignore[union-attr]
    stage.write(MEMORY + 2, b"\0")
    assert stage.watch.clean(0, SIZE)
    assert stage.here() == [FILE, MEMORY]
    assert stage.counted == 5
    assert stage.stashed()[MEMORY + 2] == b"s"
    assert not stage.watch.clean(0, SIZE)


def test_nobody_is_shown_what_does_not_belong(stage: Stage) -> None:
    stage.put(FILE + 1)
    find, belongs = stage.region.objects.find, stage.watch.belongs
    shown = [
        page
        for page in (FILE, FILE + 1, MEMORY, HIDDEN, HOLE)
        if belongs(find(page * PAGE), page * PAGE)
    ]
    assert shown == [FILE + 1, MEMORY]
    found = find(0)
    assert found is not None
    assert stage.watch.around(found, (FILE + 1) * PAGE, 0, SIZE) == (PAGE, 2 * PAGE)


def test_only_what_belongs_goes_to_the_stash(stage: Stage) -> None:
    stage.put(FILE)
    stage.write(FILE + 1, b"\0")
    stage.watch.stash(0, 16 * PAGE)
    assert stage.stashed() == {FILE: b"F"}
    # A reader makes it again, and it is hidden again.
    stage.write(FILE, b"\0")
    stage.watch.stash(0, 16 * PAGE)
    assert stage.stashed() == {FILE: b"F"}
    assert stage.here() == []
    assert not stage.watch.put
    assert written(stage) == []
    assert stage.journal.left_stashing(stage.region.id) == []


def test_what_is_hidden_does_not_hide_what_a_reader_made(stage: Stage) -> None:
    stage.watch.hiding.add(HIDDEN * PAGE, (HIDDEN + 16) * PAGE)
    stage.write(HIDDEN, b"h")
    stage.watch.stash(HIDDEN * PAGE, (HIDDEN + 16) * PAGE)
    stage.write(HIDDEN, b"\0")
    stage.watch.stash(HIDDEN * PAGE, (HIDDEN + 16) * PAGE)
    assert stage.stashed() == {HIDDEN: b"h"}


def test_zeros_of_memory_take_no_room_in_the_stash(stage: Stage) -> None:
    for page, content in ((MEMORY, b"a"), (MEMORY + 1, b"\0"), (MEMORY + 2, b"c")):
        stage.write(page, content)
    stage.write(MEMORY + 15, b"\0")
    stage.put(FILE)
    stage.write(FILE, b"\0")  # by who may: it is what the page holds
    stage.watch.stash(0, 32 * PAGE)
    assert stage.stashed() == {FILE: b"\0", MEMORY: b"a", MEMORY + 2: b"c"}
    assert stage.here() == []


def test_who_has_no_room_in_the_stash_has_nothing_moved(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.put(FILE)
    stage.write(FILE, b"2")

    def half(_: object) -> None:
        copy([(0, PAGE)])
        raise OSError(28, "full")

    copy = stage.backing.copy_to_stash
    monkeypatch.setattr(stage.backing, "copy_to_stash", half)
    with pytest.raises(OSError, match="full"):
        stage.watch.stash(0, PAGE)
    assert stage.stashed() == {}
    assert stage.here() == [FILE]
    assert not stage.watch.clean(0, SIZE)
    assert stage.journal.left_stashing(stage.region.id) == []


class Died(Exception):  # noqa: N818 - not an error
    """Where the pager dies."""


def test_the_next_pager_takes_the_page_that_is_being_stashed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.put(FILE)
    stage.write(MEMORY, b"m")

    def die(_: object) -> None:
        copy([(MEMORY * PAGE, (MEMORY + 1) * PAGE)])
        os.pwrite(stage.backing.stash.fd, b"half", MEMORY * PAGE)  # type: ignore[union-attr]
        raise Died

    copy = stage.backing.copy_to_stash
    monkeypatch.setattr(stage.backing, "copy_to_stash", die)
    with pytest.raises(Died):
        stage.watch.stash(0, 32 * PAGE)
    stage.another().recover()
    assert stage.stashed() == {}
    assert stage.here() == [FILE, MEMORY]
    assert os.pread(stage.backing.fd, 4, MEMORY * PAGE) == b"mmmm"


def test_the_next_pager_takes_the_stash_when_all_is_copied(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.put(FILE)
    punch = stage.backing.punch

    def die(_: int, __: int) -> None:
        raise Died

    monkeypatch.setattr(stage.backing, "punch", die)
    with pytest.raises(Died):
        stage.watch.stash(0, 16 * PAGE)
    monkeypatch.setattr(stage.backing, "punch", punch)
    stage.write(FILE, b"\0")  # as a reader would find it: not from here
    another = stage.another()
    another.recover()
    assert stage.stashed() == {FILE: b"F"}
    assert stage.here() == []
    assert not another.put


def test_the_next_pager_takes_the_stash_of_what_comes_back(stage: Stage) -> None:
    """It is put and written down, and is in both."""
    stage.put(FILE)
    stage.backing.copy_to_stash([(0, PAGE)])
    another = stage.another()
    another.recover()
    assert stage.stashed() == {FILE: b"F"}
    assert stage.here() == []
    assert written(stage) == []


def test_the_next_pager_reads_anew_what_was_not_written_down(stage: Stage) -> None:
    stage.put(FILE)
    stage.put(FILE + 5)
    stage.write(FILE + 1, b"F")
    stage.write(HOLE, b"\0")
    stage.watch.add((FILE + 7) * PAGE, (FILE + 8) * PAGE)  # and was taken out by a sharer
    another = stage.another()
    another.recover()
    assert stage.here() == [FILE, FILE + 5]
    assert list(another.put) == written(stage) == [(0, PAGE), (5 * PAGE, 6 * PAGE)]


def test_what_the_next_pager_has_to_hide_yet_stays(stage: Stage) -> None:
    stage.write(HIDDEN, b"h")
    another = stage.another()
    another.recover()
    assert stage.here() == [HIDDEN]
    another.stash(HIDDEN * PAGE, (HIDDEN + 16) * PAGE)
    another.hiding = Ranges()
    assert stage.stashed() == {HIDDEN: b"h"}
    stage.write(HIDDEN, b"\0")
    assert another.clean(0, SIZE)
    assert stage.stashed() == {HIDDEN: b"h"}


def test_before_it_is_known_what_is_there_nothing_is_judged(stage: Stage) -> None:
    another = stage.another()
    stage.write(FILE, b"F")
    another.add(0, PAGE)
    assert written(stage) == []
    assert not another.clean(0, SIZE)
    assert stage.here() == [FILE]
