"""Work is in proportion to what it is about, and lets others in.

Nothing here looks at a clock: what is done is counted, or is processor time of one run
between two checkpoints, with a bound far from what it takes.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from test_cancel import NONE, READ, SIZE, WRITE, some_region
from test_races import dirty, mapped, shared, some_sharer

from msharefsd.journal.journal import Journal
from msharefsd.linux import uffd
from msharefsd.linux.uffd import Fault, Feature, Outcome
from msharefsd.memory.files import MappedFile
from msharefsd.paging import marks, poison, protection, thread
from msharefsd.paging.addressspace import AddressSpaces
from msharefsd.paging.hunger import mend
from msharefsd.paging.pages import pages_of
from msharefsd.paging.populate import Populate
from msharefsd.paging.window import Window, window_of
from msharefsd.region.objects import Object, ObjectMap
from msharefsd.region.ranges import Ranges
from msharefsd.region.region import Region, Sharer
from msharefsd.threads.breath import Breath
from msharefsd.threads.runs import TOO_LONG_SECONDS, LongestRun

PAGE = 4096
BOTH = READ | WRITE
MANY = 3000
VIOLATION = Fault(0, write=True, protected=False, minor=False, thread=1)


@contextlib.contextmanager
def measured() -> Iterator[None]:
    """No run between two checkpoints is too long."""
    gc.collect()
    gc.freeze()  # all that the tests have made so far: looking at that takes longer
    run = LongestRun()
    run._serving = True
    trio.lowlevel.add_instrument(run)
    try:
        yield
        trio.lowlevel.remove_instrument(run)
    except BaseException:
        with contextlib.suppress(KeyError):
            trio.lowlevel.remove_instrument(run)
        raise
    finally:
        gc.unfreeze()
    assert run.longest < TOO_LONG_SECONDS


class Calls:
    """What would have been asked of the kernel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[str] = Counter()
        self.ranges: list[tuple[str, int, int]] = []
        for name, answer in (
            ("register", None),
            ("protect", None),
            ("unprotect", None),
            ("wake", None),
            ("poison", Outcome.DONE),
        ):
            monkeypatch.setattr(Window, name, self._recording(name, answer))
        monkeypatch.setattr(
            Window, "map_present", lambda _, start, end, **__: (end - start, Outcome.DONE)
        )

    def all(self, name: str) -> Ranges:
        """What a call was made for, all in all."""
        ranges = Ranges()
        for _, start, end in [each for each in self.ranges if each[0] == name]:
            ranges.add(start, end)
        return ranges

    def _recording(self, name: str, answer: object) -> Callable[..., object]:
        def record(_: Window, start: int, end: int, *__: object, **___: object) -> object:
            self.counts[name] += 1
            self.ranges.append((name, start, end))
            return answer

        return record


@pytest.fixture(name="calls")
def calls_fixture(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def every_second_page(region: Region, count: int) -> None:
    assert region.backing is not None
    for number in range(count):
        os.pwrite(region.backing.fd, b"x", number * 2 * PAGE)


async def test_what_is_hidden_is_armed_in_one_piece(calls: Calls) -> None:
    """A page here and a page there: r08."""
    with some_region() as (spaces, region, _):
        await spaces.mmap(region, Object(0, SIZE, BOTH, private=True), replace=True)
        some_sharer(region, 1)
        every_second_page(region, MANY)
        with measured():
            await spaces.mprotect(region, 0, SIZE, NONE)
        assert calls.counts["register"] == 1
        assert calls.counts["protect"] == MANY
        assert list(pages_of(region).armed) == [(0, (2 * MANY - 1) * PAGE)]
        assert region.backing is not None
        assert region.backing.next_data(0) == region.size
        assert region.backing.is_stashed(2 * (MANY - 1) * PAGE)
        del region.sharers[1]


async def test_a_file_that_is_mapped_often_is_written_once_each(
    directory: Path, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    """One file, many mappings of a page, all of them dirty: r09."""
    count = 200
    path = directory / "file"
    path.write_bytes(bytes(PAGE))
    looks = 0
    find = ObjectMap.find

    def counted(map_: ObjectMap, offset: int) -> Object | None:
        nonlocal looks
        looks += 1
        return find(map_, offset)

    with some_region() as (_, region, writeback):
        for number in range(count):
            at = 2 * number * PAGE
            item = Object(at, PAGE, BOTH, private=False, file=mapped(path), file_offset=0)
            region.objects.insert(item)
            dirty(region, at, b"1")
        monkeypatch.setattr(ObjectMap, "find", counted)
        nursery.start_soon(writeback.run, lambda: [region])
        await trio.testing.wait_all_tasks_blocked()
        writeback._wanted.set()
        with trio.fail_after(60):
            while pages_of(region).dirty:
                await trio.sleep(0.01)
        assert looks <= 3 * count
        assert path.read_bytes() == b"1" * PAGE
        nursery.cancel_scope.cancel()


async def test_not_all_files_are_written_at_one_time(
    directory: Path, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    path = directory / "file"
    path.write_bytes(bytes(PAGE))
    stop = trio.Event()
    begun: list[MappedFile] = []

    async def flush(_: object, __: Region, file: MappedFile, *___: int) -> None:
        begun.append(file)
        await stop.wait()

    from msharefsd.paging.writeback import ROUNDS, Writeback

    with some_region() as (_, region, writeback):
        for number in range(2 * ROUNDS):
            region.objects.insert(shared(number * PAGE, (number + 1) * PAGE, mapped(path)))
            dirty(region, number * PAGE, b"1")
        monkeypatch.setattr(Writeback, "_flush_file", flush)
        nursery.start_soon(writeback.run, lambda: [region])
        await trio.testing.wait_all_tasks_blocked()
        writeback._wanted.set()
        await trio.testing.wait_all_tasks_blocked()
        assert len(begun) == ROUNDS
        stop.set()
        await trio.testing.wait_all_tasks_blocked()
        assert len(begun) == len(set(begun)) == 2 * ROUNDS
        nursery.cancel_scope.cancel()


async def test_who_is_ready_is_so_once(calls: Calls) -> None:
    """r10."""
    with some_region() as (spaces, region, _):
        await spaces.mmap(region, Object(0, SIZE, READ, private=True), replace=True)
        every_second_page(region, MANY)
        sharer = some_sharer(region, 1)
        with measured():
            await protection.admit(pages_of(region), sharer)
        assert calls.counts["protect"] == MANY
        for _ in range(10):
            await protection.admit(pages_of(region), sharer)
        assert calls.counts["protect"] == MANY
        del region.sharers[1]


async def test_nothing_is_missed_while_one_becomes_ready(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every pause another object is protected, or another page comes."""
    with some_region() as (spaces, region, _):
        half = SIZE // 2
        await spaces.mmap(region, Object(0, half, READ, private=True), replace=True)
        await spaces.mmap(region, Object(half, half, BOTH, private=True), replace=True)
        assert region.backing is not None
        every_second_page(region, 8)
        os.pwrite(region.backing.fd, b"x", half)
        sharer = some_sharer(region, 1)
        pages, new = pages_of(region), iter(range(100, 200))

        async def pause(_: object) -> None:
            number = next(new)
            # As mprotect() does, and as a page that comes by the page server.
            protection.arm(pages, half, half + number * PAGE)
            assert region.backing is not None
            protection.protect(pages, number * PAGE, (number + 1) * PAGE)
            os.pwrite(region.backing.fd, b"x", number * PAGE)

        monkeypatch.setattr(Breath, "take", pause)
        await protection.admit(pages, sharer)
        monkeypatch.undo()
        armed, protected = calls.all("register"), calls.all("protect")
        assert all(armed.covers(start, end) for start, end in pages.armed)
        assert pages.armed.length > half
        there = list(region.backing.data(0, half))
        assert sum(end - start for start, end in there) > 8 * PAGE
        assert all(protected.covers(start, end) for start, end in there)
        del region.sharers[1]


def striped(region: Region, count: int, make: Callable[[int], Object]) -> None:
    """Objects that do not merge, put there without any call."""
    for number in range(count):
        region.objects.insert(make(number))


def stripe(number: int) -> Object:
    return Object(number * PAGE, PAGE, READ if number % 2 else BOTH, private=False)


@pytest.mark.parametrize("prot", [BOTH, READ, NONE])
async def test_one_call_on_many_objects_lets_others_in(calls: Calls, prot: int) -> None:
    """r26."""
    with some_region() as (spaces, region, _):
        striped(region, MANY, stripe)
        some_sharer(region, 1)
        with measured():
            await spaces.mprotect(region, 0, MANY * PAGE, prot)
        assert [item.prot for item in region.objects] == [prot]
        del region.sharers[1]


@pytest.mark.parametrize("name", ["munmap", "mmap", "discard"])
async def test_many_objects_go_and_others_come_in(calls: Calls, name: str) -> None:
    def private(number: int) -> Object:
        return Object(number * PAGE, PAGE, READ if number % 2 else BOTH, private=True)

    with some_region() as (spaces, region, _):
        striped(region, MANY, private)
        every_second_page(region, MANY // 2)
        end = MANY * PAGE
        with measured():
            if name == "munmap":
                await spaces.munmap(region, PAGE, end - 2 * PAGE)
            elif name == "mmap":
                new = Object(PAGE, end - 2 * PAGE, BOTH, private=False)
                await spaces.mmap(region, new, replace=True)
            else:
                await spaces.discard(region, PAGE, end - 2 * PAGE)
        assert len(region.objects) == {"munmap": 2, "mmap": 3, "discard": MANY}[name]
        assert region.backing is not None
        there = [start for start, _ in region.backing.data(PAGE, end - 2 * PAGE)]
        assert there == []


async def test_many_files_are_let_go(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = directory / "file"
    path.write_bytes(bytes(PAGE))
    fd = os.open(path, os.O_RDWR)
    closed: list[int] = []
    with some_region() as (spaces, region, _):

        def of_a_file(number: int) -> Object:
            file = MappedFile(fd, 0, may_write=True, close=closed.append, path=b"file")
            return Object(number * PAGE, PAGE, READ, private=True, file=file, file_offset=0)

        striped(region, MANY, of_a_file)
        with measured():
            await spaces.munmap(region, 0, MANY // 2 * PAGE)
        assert len(closed) == MANY // 2
    os.close(fd)


# -- poison --


def poisoned(journal: Journal, number: int) -> list[tuple[int, int]]:
    return sorted(journal.poisoned(number))


def saved(spaces: AddressSpaces, region: Region, number: int, *, writable: bool = True) -> Sharer:
    """A sharer that the journal knows."""
    spaces._journal._database.execute(
        "INSERT INTO sharers VALUES (?, ?, 1, 1, 0, 1, 1, 1.0, 0)", (number, region.id)
    )
    return some_sharer(region, number, writable=writable)


async def test_holes_side_by_side_are_one_range(calls: Calls) -> None:
    with some_region() as (spaces, region, _):
        window = window_of(saved(spaces, region, 1))
        poison_ = spaces._server.poison
        for number in range(1000):
            assert poison_.known(window, number * PAGE) is Outcome.DONE
        assert list(window.poisoned) == poisoned(spaces._journal, 1) == [(0, 1000 * PAGE)]
        poison_.mapped(window, 10 * PAGE, 11 * PAGE, by_others=True)
        here = [(0, 10 * PAGE), (11 * PAGE, 1000 * PAGE)]
        assert list(window.poisoned) == poisoned(spaces._journal, 1) == here
        assert poison_.marks._ranges == {0: 2}
        poison_.marks.forget(window)
        assert not poison_.marks._ranges
        del region.sharers[1]


async def test_what_is_not_poisoned_after_all_is_not_known(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Window, "poison", lambda *_: Outcome.RETRY)
    with some_region() as (spaces, region, _):
        window = window_of(saved(spaces, region, 1))
        assert spaces._server.poison.known(window, 0) is Outcome.RETRY
        assert list(window.poisoned) == poisoned(spaces._journal, 1) == []
        assert not pages_of(region).refused
        del region.sharers[1]


async def test_all_sharers_of_a_user_have_so_many_poisoned_ranges(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """r13: an attachment costs nothing, and each had as many."""
    monkeypatch.setattr(marks, "MOST_RANGES", 5)
    with some_region() as (spaces, region, _):
        poison_ = spaces._server.poison
        windows = [window_of(saved(spaces, region, number)) for number in (1, 2)]
        for window in windows:
            for number in range(4):
                assert poison_.known(window, 2 * number * PAGE) is Outcome.DONE
        assert [len(window.poisoned) for window in windows] == [4, 1]
        # What is known already, or next to it, costs nothing.
        poison_.known(windows[0], PAGE)
        assert [len(window.poisoned) for window in windows] == [3, 1]
        assert sum("holes" in record.message for record in caplog.records) == 1
        region.sharers.clear()


async def test_a_reader_s_poison_is_not_the_owner_s_to_clear(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """r33."""
    puts: list[bool] = []

    def put(_: Populate, window: Window, *__: object, **___: object) -> Outcome:
        puts.append(window.writable)
        return Outcome.DONE

    monkeypatch.setattr(Populate, "put", put)
    with some_region() as (spaces, region, _):
        poison_ = spaces._server.poison
        writer = window_of(saved(spaces, region, 1))
        reader = window_of(saved(spaces, region, 2, writable=False))
        for window in (writer, reader):
            for number in range(1000):
                poison_.known(window, 2 * number * PAGE)
        new = Object(0, SIZE, BOTH, private=False)
        await spaces.mmap(region, new, replace=True)
        assert puts.count(True) == 1000
        assert puts.count(False) == poison.READERS_RANGES
        assert not writer.poisoned
        assert len(reader.poisoned) == len(reader.starved) == 1000 - poison.READERS_RANGES
        # By and by, and with nobody waiting.
        async with region.change:
            with measured():
                await mend(reader, poison_.repair)
        assert not reader.poisoned
        assert not reader.starved
        region.sharers.clear()


async def test_what_is_being_replaced_is_not_mended(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Populate, "put", lambda *_, **__: Outcome.DONE)
    with some_region() as (spaces, region, _):
        window = window_of(some_sharer(region, 1))
        poison_, pages = spaces._server.poison, pages_of(region)
        region.objects.insert(Object(0, SIZE, BOTH, private=False))
        poison_.marks.restore(window, [(0, PAGE)])
        window.starved.add(0, PAGE)
        pages.leaving.add(0, SIZE)
        await mend(window, poison_.repair)
        assert window.poisoned
        pages.leaving.clear()
        await mend(window, poison_.repair)
        assert not window.poisoned
        region.sharers.clear()


async def test_a_reader_s_system_call_fails_with_nobody_waiting(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """r23: thousands of threads of a reader stood in line with its owner's calls."""
    monkeypatch.setattr(Populate, "put", lambda *_, **__: Outcome.DONE)
    with some_region() as (spaces, region, _):
        region.objects.insert(Object(0, SIZE, READ, private=False))
        window = window_of(some_sharer(region, 1, writable=False))
        assert region.backing is not None
        async with region.change:
            with trio.fail_after(60):
                await spaces._server._violations._fail_system_call(window, 0)
        assert calls.counts["poison"] == 1
        assert not window.poisoned
        assert region.backing.stash is None
        region.sharers.clear()


# -- threads of a pid namespace --


async def test_a_thread_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """r24: all threads of a process were read for each fault, where everybody waits."""
    reads: Counter[str] = Counter()
    inside = {number: 10_000 + number for number in range(1, 3001)}
    looks = 0

    def status(_: int, tid: int, key: str) -> str:
        reads[key] += 1
        return f"{tid} {tid - 10_000}" if tid - 10_000 in inside else ""

    def everybody(_: int) -> dict[int, int]:
        nonlocal looks
        looks += 1
        return dict(inside)

    monkeypatch.setattr(thread, "_field", status)
    monkeypatch.setattr(thread, "_all", everybody)
    with some_region() as (_, region, __):
        window = window_of(Sharer(1, region, 10_001, 0, True, -1))
        threads = thread.Threads()
        with pytest.raises(thread.UnknownError):
            threads.known(window, 7)
        found: list[int | None] = []

        async def find(number: int) -> None:
            found.append(await threads.find(window, number))

        async with trio.open_nursery() as nursery:
            for number in range(1, 51):
                nursery.start_soon(find, number)
        assert sorted(each or 0 for each in found) == [10_000 + each for each in range(1, 51)]
        assert looks == 1
        reads.clear()
        assert threads.known(window, 3000) == 13_000
        assert reads.total() == 2
        # Its number is another's now: nothing is believed that is not so.
        del inside[3000]
        with pytest.raises(thread.UnknownError):
            threads.known(window, 3000)
        assert await threads.find(window, 3000) is None


# -- a userfaultfd that blocks --


async def test_a_userfaultfd_that_blocks_is_asked_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """r12: poll() says that there is something, always."""
    rounds = 0
    with some_region() as (spaces, region, _):
        fd = uffd.open_own()
        uffd.handshake(fd, Feature(0))
        sharer = some_sharer(region, 1, fd=fd)
        set_blocking = os.set_blocking

        class Reader:
            """Whoever made it takes O_NONBLOCK away each time."""

            def faults(self, fd: int) -> list[Fault]:
                nonlocal rounds
                rounds += 1
                set_blocking(fd, True)
                return []

        page_server: Any = spaces._server
        page_server._reader = Reader()
        monkeypatch.setattr(os, "set_blocking", lambda fd, _: set_blocking(fd, True))
        set_blocking(fd, True)
        with trio.move_on_after(0.3):
            await page_server.serve(sharer)
        assert 1 < rounds < 100  # and not thousands
        monkeypatch.undo()
        set_blocking(fd, False)
        region.sharers.clear()
        os.close(fd)


async def test_a_long_run_is_told(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    run = LongestRun(lambda: now)
    task = trio.lowlevel.current_task()
    for seconds in (1.0, 0.04, 0.06, 0.055, 0.07):
        run.before_task_step(task)
        now += seconds
        run.after_task_step(task)
        run.before_io_wait(1)  # the first one is the start
    told = [record.getMessage() for record in caplog.records]
    assert [" ".join(each.split()[:9]) for each in told] == [
        "the longest run between two checkpoints took 60 ms",
        "the longest run between two checkpoints took 70 ms",
    ]
