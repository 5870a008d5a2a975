"""What else happens while something waits: for a file, or for others.

Each test holds something up at one point and has the other thing happen there.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from test_cancel import READ, WRITE, some_region

from msharefsd.linux import syscalls, uffd
from msharefsd.linux.uffd import Feature, Mode, Outcome
from msharefsd.memory.files import MappedFile
from msharefsd.paging import protection
from msharefsd.paging.addressspace import AddressSpaces
from msharefsd.paging.hunger import mend
from msharefsd.paging.pages import Pages, Waiting, pages_of
from msharefsd.paging.populate import Populate
from msharefsd.paging.window import Window, window_of
from msharefsd.region.objects import Object
from msharefsd.region.region import Region, Sharer

PAGE = 4096
BOTH = READ | WRITE


class Gate:
    """Holds up the first who comes."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def come(self) -> None:
        if not self.reached.is_set():
            self.reached.set()
            self.opened.wait()

    async def wait(self) -> None:
        """Until somebody has come."""
        await trio.to_thread.run_sync(self.reached.wait)


@pytest.fixture
def slow_write(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The first write to a file waits, before anything is written."""
    gate, write = Gate(), MappedFile.write

    def write_slowly(file: MappedFile, content: bytes, offset: int) -> None:
        gate.come()
        write(file, content, offset)

    monkeypatch.setattr(MappedFile, "write", write_slowly)
    yield gate
    gate.opened.set()


@pytest.fixture
def slow_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The first read of a file waits, after everything has been read."""
    gate, read = Gate(), MappedFile.read

    def read_slowly(file: MappedFile, buffer: memoryview, offset: int, page: int) -> int:
        usable = read(file, buffer, offset, page)
        gate.come()
        return usable

    monkeypatch.setattr(MappedFile, "read", read_slowly)
    yield gate
    gate.opened.set()


def mapped(path: Path, closed: list[int] | None = None) -> MappedFile:
    """A file to be mapped; `closed` gets what it closes."""

    def close(fd: int) -> None:
        if closed is not None:
            closed.append(fd)
        with contextlib.suppress(OSError):
            os.close(fd)

    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    return MappedFile(fd, 0, may_write=True, close=close)


def shared(start: int, end: int, file: MappedFile) -> Object:
    return Object(start, end - start, BOTH, private=False, file=file, file_offset=start)


def dirty(region: Region, page: int, content: bytes, *writers: Sharer) -> None:
    assert region.backing is not None
    os.pwrite(region.backing.fd, content * PAGE, page)
    found = region.objects.find(page)
    assert found is not None
    assert found.file is not None
    pages_of(region).dirty.add(page, found.file, [window_of(each) for each in writers])


def some_sharer(region: Region, number: int, *, writable: bool = True, fd: int = -1) -> Sharer:
    sharer = Sharer(number, region, os.getpid(), 0, writable, fd)
    region.sharers[number] = sharer
    return sharer


async def test_who_begins_to_write_while_another_page_is_written_back_is_not_forgotten(
    directory: Path, slow_write: Gate, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    path = directory / "file"
    path.write_bytes(bytes(3 * PAGE))
    protected: dict[int, set[Window]] = {}

    def protect(_: Pages, start: int, end: int, writers: set[Window]) -> None:
        assert end == start + PAGE
        protected[start] = writers

    monkeypatch.setattr(protection, "protect", protect)
    with some_region() as (spaces, region, writeback):
        nursery.start_soon(writeback.run, lambda: ())
        await trio.testing.wait_all_tasks_blocked()
        await spaces.mmap(region, shared(0, 3 * PAGE, mapped(path)), replace=True)
        first, second = (Sharer(number, region, 0, 0, True, -1) for number in (1, 2))
        dirty(region, 0, b"1", first)
        dirty(region, 2 * PAGE, b"1", first)
        async with trio.open_nursery() as calls:
            calls.start_soon(spaces.msync, region, 0, 3 * PAGE)
            await slow_write.wait()
            pages_of(region).dirty.writers(2 * PAGE).add(window_of(second))
            slow_write.opened.set()
        one, two = window_of(first), window_of(second)
        assert protected == {0: {one}, 2 * PAGE: {one, two}}
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("when", ["before", "meanwhile"])
async def test_a_page_that_is_in_the_stash_is_written_back(
    directory: Path, slow_write: Gate, nursery: trio.Nursery, when: str
) -> None:
    """It is there for an instant when a system call is refused to write to it."""
    path = directory / "file"
    path.write_bytes(bytes(3 * PAGE))
    with some_region() as (spaces, region, writeback):
        nursery.start_soon(writeback.run, lambda: ())
        await trio.testing.wait_all_tasks_blocked()
        await spaces.mmap(region, shared(0, 3 * PAGE, mapped(path)), replace=True)
        dirty(region, 0, b"1")
        dirty(region, 2 * PAGE, b"3")
        assert region.backing is not None
        if when == "before":
            region.backing.stash_pages(2 * PAGE, PAGE)
        async with trio.open_nursery() as calls:
            calls.start_soon(spaces.msync, region, 0, 3 * PAGE)
            await slow_write.wait()
            if when == "meanwhile":
                region.backing.stash_pages(2 * PAGE, PAGE)
            slow_write.opened.set()
        assert path.read_bytes() == b"1" * PAGE + bytes(PAGE) + b"3" * PAGE
        assert not pages_of(region).dirty
        nursery.cancel_scope.cancel()


def test_a_file_that_is_truncated_between_two_writes_stays_short(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write may take less than it was given: a signal, a limit, a file system's own affair."""
    path, write, written = directory / "file", os.pwrite, list[int]()
    path.write_bytes(b"old" * PAGE)
    file = mapped(path)

    def write_a_part(fd: int, content: bytes, offset: int) -> int:
        written.append(write(fd, content[:PAGE], offset))
        if len(written) == 1:
            os.truncate(path, PAGE + 5)
        return written[-1]

    monkeypatch.setattr(os, "pwrite", write_a_part)
    file.write(b"n" * 3 * PAGE, 0)
    assert path.read_bytes() == b"n" * (PAGE + 5)
    file.let_go()


async def test_a_file_that_is_unmapped_while_another_is_written_is_closed_once(
    directory: Path, slow_write: Gate, nursery: trio.Nursery
) -> None:
    paths = [directory / "one", directory / "two"]
    closed: list[int] = []
    with some_region() as (spaces, region, writeback):
        nursery.start_soon(writeback.run, lambda: ())
        await trio.testing.wait_all_tasks_blocked()
        for number, path in enumerate(paths):
            path.write_bytes(bytes(2 * PAGE))
            file = mapped(path, closed)
            place = number * PAGE
            await spaces.mmap(region, shared(place, place + PAGE, file), replace=True)
            dirty(region, place, b"4")
        async with trio.open_nursery() as calls:
            calls.start_soon(spaces.munmap, region, 0, 2 * PAGE)
            await slow_write.wait()
            await spaces.munmap(region, PAGE, PAGE)
            file.let_go()  # our own
            assert len(closed) == 1
            slow_write.opened.set()
        assert len(closed) == 1, "and nothing else in its place"
        assert paths[1].read_bytes() == bytes(PAGE) + b"4" * PAGE
        nursery.cancel_scope.cancel()


async def test_what_was_read_before_memory_starts_fresh_is_not_used(
    directory: Path, slow_read: Gate, nursery: trio.Nursery
) -> None:
    path = directory / "file"
    path.write_bytes(b"1" * PAGE)
    with some_region() as (spaces, region, _):
        server = spaces._server
        await nursery.start(server.run)
        file = Object(0, PAGE, BOTH, private=True, file=mapped(path))
        await spaces.mmap(region, file, replace=True)
        fd = uffd.open_own()
        uffd.handshake(fd, Feature(0))
        reader = some_sharer(region, 1, writable=False, fd=fd)
        server.fills.read(file, 0, PAGE, Waiting(window_of(reader), 0, None))
        await slow_read.wait()
        path.write_bytes(b"2" * PAGE)
        await spaces.discard(region, 0, PAGE)
        slow_read.opened.set()
        while pages_of(region).reading:
            await trio.sleep(0.001)
        assert region.backing is not None
        assert region.backing.next_data(0) > 0
        server.fills.read(file, 0, PAGE, Waiting(window_of(reader), 0, None))
        while pages_of(region).reading:
            await trio.sleep(0.001)
        assert os.pread(region.backing.fd, PAGE, 0) == b"2" * PAGE
        del region.sharers[1]
        os.close(fd)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("outcome", [Outcome.NO_MEMORY, Outcome.RETRY])
@pytest.mark.parametrize("empty", [False, True])
async def test_poison_that_could_not_be_cleared_is_not_forgotten(
    monkeypatch: pytest.MonkeyPatch, outcome: Outcome, *, empty: bool
) -> None:
    with some_region() as (spaces, region, _):
        region.objects.insert(Object(0, 2 * PAGE, BOTH, private=False))
        sharer = some_sharer(region, 1)
        window = window_of(sharer)
        spaces._server.poison.marks.restore(window, [(PAGE, 2 * PAGE)])
        monkeypatch.setattr(Populate, "put", lambda *_, **__: outcome)
        await spaces._server.poison.clear(pages_of(region), 0, region.size, empty=empty)
        assert list(window.poisoned) == list(window.starved) == [(PAGE, 2 * PAGE)]
        monkeypatch.setattr(Populate, "put", lambda *_, **__: Outcome.DONE)
        await mend(window, spaces._server.poison.repair)
        assert list(window.poisoned) == list(window.starved) == []
        del region.sharers[1]


@contextlib.contextmanager
def own_window(spaces: AddressSpaces, region: Region, pages: int) -> Iterator[Window]:
    """Ours, with poison where so many holes have been touched."""
    assert region.backing is not None
    fd = uffd.open_own()
    uffd.handshake(fd, spaces._server._capabilities.features & ~Feature.EVENT_FORK)
    fixed = syscalls.MAP_SHARED | syscalls.MAP_FIXED_NOREPLACE
    syscalls.mmap(region.start, region.size, BOTH, fixed, region.backing.fd, 0)
    try:
        uffd.register(fd, region.start, region.size, Mode.MISSING)
        window = window_of(some_sharer(region, 1, fd=fd))
        for page in range(pages):
            assert spaces._server.poison.known(window, page * PAGE) is Outcome.DONE
        yield window
    finally:
        region.sharers.clear()
        syscalls.munmap(region.start, region.size)
        os.close(fd)


def seen(window: Window, pages: int) -> bytes:
    """What is there; raises OSError where there is poison."""
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        return os.pread(memory.fileno(), pages * PAGE, window.start)


async def test_poison_goes_from_a_window_in_several_pieces() -> None:
    """The kernel maps nothing over more than one VMA (ENOENT)."""
    with some_region() as (spaces, region, _), own_window(spaces, region, 8) as window:
        with pytest.raises(OSError, match="Input/output error"):
            seen(window, 1)
        syscalls.madvise(region.start + 3 * PAGE, 2 * PAGE, mmap.MADV_DONTDUMP)
        region.objects.insert(Object(0, 8 * PAGE, BOTH, private=False))
        assert region.backing is not None
        os.pwrite(region.backing.fd, b"x" * 8 * PAGE, 0)
        await spaces._server.poison.clear(pages_of(region), 0, region.size)
        assert not window.poisoned
        assert seen(window, 8) == b"x" * 8 * PAGE


async def test_poison_goes_where_somebody_else_has_read_a_part_of_it(
    directory: Path, slow_read: Gate, nursery: trio.Nursery
) -> None:
    path = directory / "file"
    path.write_bytes(b"f" * 4 * PAGE)
    with some_region() as (spaces, region, _), own_window(spaces, region, 4) as window:
        await nursery.start(spaces._server.run)
        assert region.backing is not None
        file = Object(0, 4 * PAGE, BOTH, private=True, file=mapped(path))
        region.objects.insert(file)
        await spaces._server.poison.clear(pages_of(region), 0, region.size)
        await slow_read.wait()
        os.pwrite(region.backing.fd, b"f" * PAGE, 2 * PAGE)
        slow_read.opened.set()
        while pages_of(region).reading:
            await trio.sleep(0.001)
        assert not window.poisoned
        assert seen(window, 4) == b"f" * 4 * PAGE
        nursery.cancel_scope.cancel()


async def test_a_hole_that_one_was_refused_shows_nobody_anything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def put(*_: object, **__: object) -> None:
        raise AssertionError("everybody sees a page there")

    with some_region() as (spaces, region, _):
        sharer = some_sharer(region, 1)
        window = window_of(sharer)
        spaces._server.poison.marks.restore(window, [(PAGE, 2 * PAGE)])
        monkeypatch.setattr(Populate, "put", put)
        await spaces._server.poison.clear(pages_of(region), 0, region.size)
        assert list(window.poisoned) == [(PAGE, 2 * PAGE)]
        assert pages_of(region).refused == {window}
        del region.sharers[1]
