"""A caller that is killed: its call is carried out or it is not.

Each call on a region is cancelled at each of its steps, as the end of its process does,
and afterwards the map and the memory must fit together.  And what was written to a file
for it does not come after what others wrote later.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from both import Both

from msharefsd.errors import Refused
from msharefsd.journal.journal import Journal
from msharefsd.linux import features, syscalls
from msharefsd.memory import names
from msharefsd.memory.files import MappedFile
from msharefsd.memory.shmbacking import ShmBacking
from msharefsd.memory.sparse import AT_ONCE
from msharefsd.paging.addressspace import AddressSpaces
from msharefsd.paging.pages import pages_of
from msharefsd.paging.server import PageServer
from msharefsd.paging.writeback import Writeback
from msharefsd.region.limits import Limits
from msharefsd.region.objects import Object
from msharefsd.region.region import Region
from msharefsd.telemetry.metrics import Metrics
from msharefsd.threads.disposal import Disposal
from msharefsd.threads.pool import Threads

ALIGNMENT = 2 << 20
SIZE = 4 * AT_ONCE
PAGES = (0, AT_ONCE - 4096, AT_ONCE, 3 * AT_ONCE, SIZE - 4096)
READ, WRITE, NONE = syscalls.PROT_READ, syscalls.PROT_WRITE, syscalls.PROT_NONE


class _CancelAt(trio.abc.Instrument):
    """Cancels a scope when its task has taken so many steps."""

    def __init__(self, scope: trio.CancelScope, step: int) -> None:
        self._task = trio.lowlevel.current_task()
        self._scope = scope
        self._left = step

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self._left -= 1
            if self._left == 0:
                self._scope.cancel()


async def cut_off(call: Awaitable[None], step: int) -> bool:
    """Run it, cancelled after `step` steps; whether it came to its end before that."""
    with trio.CancelScope() as scope:
        instrument = _CancelAt(scope, step)
        trio.lowlevel.add_instrument(instrument)
        try:
            await call
        finally:
            trio.lowlevel.remove_instrument(instrument)
    return not scope.cancel_called


@contextlib.contextmanager
def some_region() -> Iterator[tuple[AddressSpaces, Region, Writeback]]:
    """A region with pages here and there, all of it one object."""
    disposal = Disposal()
    memory = names.Mark(Path(f"/test-{os.getpid()}"), "0", 0).new()

    def make(number: int, start: int, size: int, kind: str) -> ShmBacking:
        return ShmBacking(memory, size, disposal)

    regions = Both(ALIGNMENT, make)
    metrics, threads = Metrics(regions.alive), Threads(Limits().threads)
    found = features.probe(frozenset())
    pages = PageServer(found, metrics, None, threads, regions.journal)
    try:
        region = regions.create(b"r", 0o600, 0, 0)
        regions.make(region, ALIGNMENT, SIZE, read_only=False)
        regions.commit(region)
        writeback = Writeback(threads, metrics, regions.journal)
        yield AddressSpaces(found, pages, writeback, regions.journal), region, writeback
    finally:
        regions.close()
        disposal.close()


async def fill(spaces: AddressSpaces, region: Region) -> None:
    await spaces.mmap(region, Object(0, SIZE, READ | WRITE, private=True), replace=True)
    assert region.backing is not None
    for at in PAGES:
        os.pwrite(region.backing.fd, b"x" * 4096, at)


def fits(region: Region) -> None:
    """No page is where the map says that there is none; nobody can touch what is hidden."""
    assert region.backing is not None
    for start, end in region.backing.data(0, SIZE):
        for at in range(start, end, 4096):
            found = region.objects.find(at)
            assert found is not None, f"a page in a hole, at {at:#x}"
            assert found.accessible, f"a page that nobody may touch, at {at:#x}"
    stash = region.backing.stash
    for start, end in stash.data(0, SIZE) if stash else ():
        for at in range(start, end, 4096):
            assert region.objects.find(at) is not None, f"a hidden page of nothing, at {at:#x}"


def new(start: int, end: int, prot: int) -> Object:
    return Object(start, end - start, prot, private=False)


Call = Callable[[AddressSpaces, Region], Awaitable[None]]
CALLS: dict[str, Call] = {
    "munmap": lambda spaces, region: spaces.munmap(region, 0, SIZE),
    "munmap-part": lambda spaces, region: spaces.munmap(region, 4096, 2 * AT_ONCE),
    "mmap": lambda spaces, region: spaces.mmap(
        region, new(0, 3 * AT_ONCE, READ | WRITE), replace=True
    ),
    "mmap-none": lambda spaces, region: spaces.mmap(region, new(AT_ONCE, SIZE, NONE), replace=True),
    "mprotect-none": lambda spaces, region: spaces.mprotect(region, 0, SIZE, NONE),
    "mprotect-read": lambda spaces, region: spaces.mprotect(region, 0, SIZE, READ),
    "discard": lambda spaces, region: spaces.discard(region, 0, SIZE),
}


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("name", CALLS)
async def test_a_call_that_is_cut_off_leaves_map_and_memory_in_step(
    name: str, *, hidden: bool
) -> None:
    steps = 0
    with some_region() as (spaces, region, _):
        while True:
            steps += 1
            await fill(spaces, region)
            if hidden:
                await spaces.mprotect(region, 0, SIZE, NONE)
            before = list(region.objects)
            complete = await cut_off(CALLS[name](spaces, region), steps)
            fits(region)
            if complete:
                break
            after = list(region.objects)
            await fill(spaces, region)
            if hidden:
                await spaces.mprotect(region, 0, SIZE, NONE)
            await CALLS[name](spaces, region)
            assert after in (before, list(region.objects)), "neither done nor not done"
    assert steps > 1


@pytest.mark.parametrize("name", ["mmap", "discard"])
async def test_nobody_writes_to_what_the_next_pager_would_clear(
    name: str, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    """There is no room to write down that it is cleared: who touches it waits for that, too."""
    refused, room, right = trio.Event(), False, Journal.cleared

    def cleared(journal: Journal, region: int) -> None:
        if not room:
            refused.set()
            raise Refused(errno.ENOSPC, "a full disk")
        right(journal, region)

    with some_region() as (spaces, region, _):
        await fill(spaces, region)
        monkeypatch.setattr(Journal, "cleared", cleared)
        done = trio.Event()

        async def call() -> None:
            await CALLS[name](spaces, region)
            done.set()

        nursery.start_soon(call)
        await refused.wait()
        assert pages_of(region).leaving.contains(PAGES[1])
        room = True
        await done.wait()
        assert not pages_of(region).leaving
        fits(region)


async def test_what_a_killed_caller_had_written_does_not_overtake_what_came_later(
    directory: Path, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    path = directory / "file"
    path.write_bytes(bytes(4096))
    slow, may_write = threading.Event(), threading.Event()
    write = MappedFile.write

    def write_slowly(file: MappedFile, content: bytes, offset: int) -> None:
        if not slow.is_set():  # the first one
            slow.set()
            may_write.wait()
        write(file, content, offset)

    monkeypatch.setattr(MappedFile, "write", write_slowly)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    file = MappedFile(fd, 0, may_write=True, close=os.close)
    with some_region() as (spaces, region, writeback):
        nursery.start_soon(writeback.run, lambda: ())
        await trio.testing.wait_all_tasks_blocked()
        assert region.backing is not None
        await spaces.mmap(
            region, Object(0, 4096, READ | WRITE, private=False, file=file), replace=True
        )
        os.pwrite(region.backing.fd, b"1" * 4096, 0)
        pages_of(region).dirty.add(0, file)
        with trio.CancelScope() as killed:
            nursery.start_soon(_when, slow, killed.cancel)
            await spaces.msync(region, 0, 4096)
        assert killed.cancelled_caught
        os.pwrite(region.backing.fd, b"2" * 4096, 0)
        pages_of(region).dirty.add(0, file)
        try:
            with trio.move_on_after(0.2) as early:
                await spaces.msync(region, 0, 4096)
            assert early.cancelled_caught, "the older write is not done yet"
        finally:
            may_write.set()
        await spaces.msync(region, 0, 4096)
        assert path.read_bytes() == b"2" * 4096
        nursery.cancel_scope.cancel()


async def _when(event: threading.Event, then: Callable[[], None]) -> None:
    await trio.to_thread.run_sync(event.wait)
    then()
