"""Calls on other users' processes: what becomes of those that do not come back.

A call that waits for a lock of its test's stands for one that waits for an address space.
That no process of another user holds up its owner's pager is looked at by
hostile/test_walls.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
import trio.testing
from test_cancel import READ, WRITE, some_region
from test_races import dirty, mapped, shared

from msharefsd.linux import syscalls, uffd
from msharefsd.linux.features import probe
from msharefsd.linux.uffd import Fault, Mode, Outcome
from msharefsd.memory.backing import Backing
from msharefsd.memory.buffers import Buffers
from msharefsd.paging import lanes as lanes_module
from msharefsd.paging import protection
from msharefsd.paging.addressspace import AddressSpaces
from msharefsd.paging.lanes import Far, Lanes, Waits
from msharefsd.paging.pages import pages_of
from msharefsd.paging.server import PageServer
from msharefsd.paging.window import Window, window_of
from msharefsd.region.objects import Object
from msharefsd.region.region import Region, Sharer
from msharefsd.threads.lane import MOST_HUNG, Descriptors, Lane, LateError, Request

PAGE = syscalls.PAGE
BOTH = READ | WRITE
OTHER = 12345
T = TypeVar("T")
HANG_SECONDS = 30.0


class Lock:
    """What an address space is locked with: who comes waits until it is let go of."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def wait(self, _: object = None) -> str:
        self.opened.wait()
        return "back"


@dataclass
class Told:
    """What a lane tells."""

    readable: list[tuple[int, object]] = field(default_factory=list)
    watched: list[bool] = field(default_factory=list)
    caught_up: int = 0
    room: bool = False

    def on_readable(self, key: int, found: object, watched: bool) -> None:
        self.readable.append((key, found))
        self.watched.append(watched)

    def has(self, count: int) -> bool:
        return len(self.readable) == count

    def has_room(self, _: int) -> bool:
        return self.room

    def on_caught_up(self) -> None:
        self.caught_up += 1


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def lock() -> Iterator[Lock]:
    made = Lock()
    yield made
    made.opened.set()


@pytest.fixture
async def lane(told: Told, lock: Lock, nursery: trio.Nursery) -> Lane:
    made = Lane(lambda fd: os.read(fd, 10), told.has_room, told.on_readable, told.on_caught_up)
    nursery.start_soon(made.run)
    assert await made.ask(None, lambda _: 1, HANG_SECONDS) == 1
    return made


async def until(true: Callable[[], object]) -> None:
    """Wait for that; the test's own time limit says for how long."""
    while not true():
        await trio.sleep(0.001)


async def call(lane: Lane, function: Callable[[Descriptors], T]) -> T:
    """What it comes to, however long that takes on a busy machine."""
    return await lane.ask(None, function, HANG_SECONDS)


async def test_a_call_comes_to_what_its_function_does(lane: Lane) -> None:
    assert await call(lane, lambda _: 7) == 7
    with contextlib.suppress(LateError):
        assert lane.call(None, lambda _: 8) == 8
    with pytest.raises(FileNotFoundError):
        await call(lane, lambda _: os.stat("/nowhere"))


async def test_nobody_waits_for_a_call_that_does_not_come_back(
    lane: Lane, told: Told, lock: Lock
) -> None:
    done: list[str] = []

    def after(request: Request) -> None:
        done.append(str(request.value))

    with pytest.raises(LateError):
        lane.call("first", lock.wait, after)
    assert lane.is_late
    await until(lambda: hangs(lane, "first"))
    with pytest.raises(LateError):  # what need not happen does not
        lane.call("second", lambda _: done.append("needless"))
    with pytest.raises(LateError):
        lane.call("third", lambda _: "third", after)
    assert done == []
    before = told.caught_up
    lock.opened.set()
    await until(lambda: not lane.is_late)
    assert done == ["back", "third"]
    assert told.caught_up == before + 1


async def test_who_is_late_again_and_again_is_waited_for_less(lane: Lane, told: Told) -> None:
    waited = 0
    for _ in range(20):
        lock = Lock()
        begun = threading.Event()

        def slow(_: Descriptors, lock: Lock = lock, begun: threading.Event = begun) -> None:
            begun.set()
            lock.wait()

        with contextlib.suppress(LateError):
            lane.call(None, slow)
        waited += begun.is_set()
        lock.opened.set()
        if lane.is_late:
            await until(lambda: not lane.is_late)
    assert 0 < waited < 20  # the credit is for CREDIT / MOMENT of them, and little more


async def test_that_we_were_stopped_is_nobodys_debt(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its credit: nothing would be waited for, for 33 times as long as that has lasted."""
    stopped, right = 0.0, time.monotonic
    asked: list[int] = []

    def stop(_: Descriptors) -> None:
        nonlocal stopped
        stopped = 1000.0

    monkeypatch.setattr(time, "monotonic", lambda: right() + stopped)
    with contextlib.suppress(LateError):
        lane.call(None, stop)
    await until(lambda: stopped and not lane.is_late)
    with contextlib.suppress(LateError):
        lane.call(None, lambda _: asked.append(5))
    assert await call(lane, lambda _: asked) == [5], "it was asked, however late that is"


async def test_a_descriptor_that_was_handed_in_is_the_lanes_alone(lane: Lane) -> None:
    reader, writer = os.pipe()
    number = writer
    key = lane.hand_in(writer)
    assert not os.path.exists(f"/proc/self/fd/{number}") or number == reader
    await call(lane, lambda table: os.write(table[key], b"x"))
    assert os.read(reader, 10) == b"x"
    lane.close(None, key)
    assert await trio.to_thread.run_sync(os.read, reader, 10) == b""  # it was the last one
    with pytest.raises(ProcessLookupError):
        await call(lane, lambda table: table[key])
    await until(lambda: lane.unclosed == 0)
    os.close(reader)


async def test_it_has_none_of_our_descriptors(lane: Lane) -> None:
    reader, writer = os.pipe()

    def in_lane(_: Descriptors) -> bool:
        return os.path.exists(f"/proc/thread-self/fd/{writer}") and os.path.samestat(
            os.stat(f"/proc/thread-self/fd/{writer}"), here
        )

    here = os.fstat(writer)
    assert await call(lane, in_lane) is False
    os.close(writer)
    assert os.read(reader, 1) == b""
    os.close(reader)


async def test_what_is_handed_in_to_one_thathangs_is_not_closed_by_us(
    lane: Lane, lock: Lock
) -> None:
    lane.post(None, lock.wait)
    reader, writer = os.pipe()
    key = lane.hand_in(writer)
    poll = select.poll()
    poll.register(reader, select.POLLHUP)
    assert poll.poll(0) == []
    lock.opened.set()
    assert await call(lane, lambda table: os.write(table[key], b"x")) == 1
    lane.close(None, key)
    await trio.to_thread.run_sync(poll.poll)
    os.close(reader)


async def test_another_thread_goes_on_in_place_of_one_thathangs(
    lane: Lane, told: Told, lock: Lock
) -> None:
    done: list[object] = []
    with pytest.raises(LateError):
        lane.call("bad", lock.wait, lambda request: done.append(request.value))
    with pytest.raises(LateError):
        lane.call("good", lambda _: "good", lambda request: done.append(request.value))
    await until(lambda: hangs(lane, "bad"))
    leave_behind(lane)
    await until(lambda: not lane.is_late)
    assert done == ["good"]
    assert lane.hung == 1
    lock.opened.set()
    await until(lambda: lane.hung == 0)
    assert done == ["good"]  # nobody is told of what was given up
    assert await call(lane, lambda _: 3) == 3


def hangs(lane: Lane, owner: object) -> bool:
    hanging = lane.hanging()
    return hanging is not None and hanging.owner == owner


def leave_behind(lane: Lane) -> None:
    hanging = lane.hanging()
    assert hanging is not None
    lane.leave_behind(hanging)


async def test_so_many_may_hang_and_no_more(lane: Lane, lock: Lock) -> None:
    for number in range(MOST_HUNG):
        with contextlib.suppress(LateError):
            lane.call(number, lock.wait, lambda _: None)
        await until(partial(hangs, lane, number))
        leave_behind(lane)
    assert lane.is_lost
    with contextlib.suppress(LateError):
        lane.call("one more", lock.wait, lambda _: None)
    await until(lambda: hangs(lane, "one more"))
    before = threading.active_count()
    leave_behind(lane)
    assert hangs(lane, "one more")
    assert threading.active_count() == before
    lock.opened.set()
    await until(lambda: not lane.hung and not lane.is_late)
    assert await call(lane, lambda _: 3) == 3


async def test_what_can_be_read_is_told_once(lane: Lane, told: Told, lock: Lock) -> None:
    reader, writer = os.pipe()
    key = lane.hand_in(reader)
    lane.post(None, lambda table: table.watch(key))
    os.write(writer, b"one")
    await until(lambda: told.readable)
    assert told.readable == [(key, b"one")]
    os.write(writer, b"two")
    lane.post(None, lock.wait)
    for _ in range(20):
        await trio.sleep(0.001)
    assert len(told.readable) == 1
    lock.opened.set()
    lane.post(None, lambda table: table.watch(key))
    await until(lambda: len(told.readable) == 2)
    assert told.readable[1] == (key, b"two")
    lane.close(None, key)
    os.close(writer)


async def test_where_there_is_room_it_goes_on_watching(lane: Lane, told: Told) -> None:
    reader, writer = os.pipe()
    key = lane.hand_in(reader)
    told.room = True
    lane.post(None, lambda table: table.watch(key))
    for number in (1, 2):
        os.write(writer, b"%d" % number)
        await until(partial(told.has, number))
    told.room = False
    os.write(writer, b"3")
    await until(lambda: len(told.readable) == 3)
    assert told.watched == [True, True, False]
    lane.close(None, key)
    os.close(writer)


async def test_nothing_is_left_of_one_that_is_stopped(told: Told) -> None:
    async with trio.open_nursery() as nursery:
        await trio.to_thread.run_sync(lambda: None)
        threads, fds = threading.active_count(), len(os.listdir("/proc/self/fd"))
        lane = Lane(lambda fd: os.read(fd, 10), told.has_room, told.on_readable, told.on_caught_up)
        nursery.start_soon(lane.run)
        reader, writer = os.pipe()
        key = lane.hand_in(writer)
        assert await lane.ask(None, lambda table: table[key], HANG_SECONDS) > 0
        lane.stop()
    assert await trio.to_thread.run_sync(os.read, reader, 1) == b""
    os.close(reader)
    await until(lambda: threading.active_count() <= threads)
    assert len(os.listdir("/proc/self/fd")) <= fds


# -- windows of other users' processes --


@dataclass
class Seen:
    """Sharers that were given up."""

    given_up: list[Sharer] = field(default_factory=list)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()
    monkeypatch.setattr(PageServer, "give_up", lambda _, sharer: found.given_up.append(sharer))
    monkeypatch.setattr(lanes_module, "PATIENCE", 0.2)
    return found


async def some_far(server: PageServer, region: Region, number: int = 1) -> Window:
    """A writer's window, of a process of another user that is in truth this one."""
    assert region.backing is not None
    fd = uffd.open_own()
    far = server.lanes.take(OTHER, fd)
    far.shake_hands(probe(frozenset()).features)
    await far.greeted()
    sharer = Sharer(number, region, 0, OTHER, True, -1)
    region.sharers[number] = sharer
    window = window_of(sharer)
    window.far, far.sharer = far, sharer
    flags = syscalls.MAP_SHARED | syscalls.MAP_NORESERVE
    window.start = syscalls.mmap(None, region.size, BOTH, flags, region.backing.fd, 0)
    modes = Mode.MISSING | Mode.WP
    await far._lane.ask(far, far._on(uffd.register, window.start, region.size, modes), HANG_SECONDS)
    return window


@dataclass
class World:
    """A region, and a writer of another user."""

    spaces: AddressSpaces
    server: PageServer
    region: Region
    window: Window

    @property
    def far(self) -> Far:
        assert self.window.far is not None
        return self.window.far

    @property
    def backing(self) -> Backing:
        assert self.region.backing is not None
        return self.region.backing

    async def lock(self, lock: Lock, window: Window | None = None) -> None:
        """The lane hangs in that process from now on."""
        far = self.far if window is None else window.far
        assert far is not None
        with contextlib.suppress(LateError):
            far._lane.call(far, lock.wait)
        await until(lambda: far.is_late)

    def touch(self, offset: int, *, write: bool = False) -> None:
        """What the page server does for a thread of the process that touches a page."""
        fault = Fault(self.window.start + offset, write, protected=False, minor=False, thread=0)
        self.server._answer(self.window, fault)

    def has(self, offset: int) -> bool:
        return self.backing.next_data(offset) == offset


@pytest.fixture
async def world(
    monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery, lock: Lock
) -> AsyncIterator[World]:
    monkeypatch.setattr(Lanes, "needs_one", lambda _, uid: uid == OTHER)
    with some_region() as (spaces, region, writeback):
        server = spaces._server
        await nursery.start(server.run)
        nursery.start_soon(writeback.run, lambda: ())
        made = World(spaces, server, region, await some_far(server, region))
        yield made
        lock.opened.set()
        for sharer in list(region.sharers.values()):
            server.close(sharer)
        await until(lambda: not made.far._lane.is_late and not made.far._lane.unclosed)
        region.sharers.clear()
        nursery.cancel_scope.cancel()


def plain(world: World, prot: int = BOTH) -> Object:
    made = Object(0, 16 * PAGE, prot, private=False)
    world.region.objects.insert(made)
    return made


def read_by_kernel(address: int) -> bytes:
    """Four bytes there; who waits for a page must not hold Python's lock."""
    reader, writer = os.pipe()
    try:
        os.write(writer, (ctypes.c_char * 4).from_address(address))
        return os.read(reader, 4)
    finally:
        os.close(reader)
        os.close(writer)


async def test_faults_are_read_and_answered(world: World, nursery: trio.Nursery) -> None:
    plain(world)
    nursery.start_soon(world.server.serve, world.region.sharers[1])
    for page in (0, 8, 3):
        at = world.window.start + page * PAGE
        assert await trio.to_thread.run_sync(read_by_kernel, at) == bytes(4)
        assert world.has(page * PAGE)


async def test_a_page_comes_although_its_process_is_locked(world: World, lock: Lock) -> None:
    plain(world)
    await world.lock(lock)
    world.touch(0)
    assert world.has(0)


@pytest.mark.parametrize("content", [b"1", b""])
async def test_what_is_copied_too_late_is_not_copied(
    world: World, lock: Lock, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    """It would come where something else is by then."""
    plain(world)
    copy, begun, results = uffd.copy, threading.Event(), []

    def slowly(fd: int, start: int, source: int, length: int, *, protect: bool) -> object:
        if threading.current_thread() is threading.main_thread():  # the host mapping
            return copy(fd, start, source, length, protect=protect)
        begun.set()
        lock.wait()
        results.append(copy(fd, start, source, length, protect=protect))
        return results[-1]

    monkeypatch.setattr(uffd, "copy", slowly)
    populate = world.server.populate
    buffer, address = populate.buffers.take(PAGE), None
    if content:
        buffer.view[:PAGE] = content * PAGE
        address = buffer.address
    outcome = populate.put(world.window, 0, PAGE, address, guarded=False)
    populate.buffers.give_back(buffer)
    await until(begun.is_set)
    assert outcome is Outcome.PRESENT
    assert os.pread(world.backing.fd, PAGE, 0) == (content or b"\0") * PAGE
    world.backing.punch(0, PAGE)
    lock.opened.set()
    await until(lambda: not world.far.is_late)
    assert not world.has(0), "the page of a moment ago is there again"
    assert results == [(0, Outcome.NO_MEMORY)]  # EFAULT
    assert not world.far._user.kept


async def test_buffers_that_nobody_copies_from_are_used_again() -> None:
    buffers = Buffers()
    first = buffers.take(PAGE)
    address = first.address
    buffers.give_back(first)
    assert buffers.take(PAGE).address == address


async def test_what_cannot_be_protected_is_not_shown(
    world: World, lock: Lock, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken: list[int] = []
    monkeypatch.setattr(protection, "wake", lambda _, start, __: woken.append(start))
    pages = pages_of(world.region)
    plain(world, READ)
    protection.arm(pages, 0, 16 * PAGE)
    await world.lock(lock)
    outcome = world.server.populate.put(world.window, 0, PAGE, None, guarded=True)
    assert outcome is Outcome.RETRY
    assert pages.behind == {world.window}
    world.touch(PAGE)  # whoever it is
    assert not world.has(0)
    assert not world.has(PAGE)
    lock.opened.set()
    await until(lambda: not pages.behind)
    assert woken == [0]
    world.touch(PAGE)
    assert world.has(PAGE)


async def test_a_page_is_not_written_back_while_somebody_could_write_it(
    world: World, lock: Lock, directory: Path, nursery: trio.Nursery
) -> None:
    path = directory / "file"
    path.write_bytes(bytes(PAGE))
    await world.spaces.mmap(world.region, shared(0, PAGE, mapped(path)), replace=True)
    dirty(world.region, 0, b"1", world.region.sharers[1])
    await world.lock(lock)
    async with trio.open_nursery() as calls:
        calls.start_soon(world.spaces.msync, world.region, 0, PAGE)
        await until(lambda: pages_of(world.region).behind)
        assert path.read_bytes() == bytes(PAGE)
        ctypes.memset(world.window.start, ord("2"), PAGE)  # it is not protected
        lock.opened.set()
    assert path.read_bytes() == b"2" * PAGE


async def test_a_call_does_not_wait_for_ever_for_who_cannot_be_protected(
    world: World, lock: Lock, seen: Seen
) -> None:
    plain(world)
    await world.lock(lock)
    await world.spaces.mprotect(world.region, 0, 16 * PAGE, READ)
    assert seen.given_up == [world.region.sharers[1]]
    assert not pages_of(world.region).behind
    assert world.window.is_gone()


async def test_only_that_process_is_given_up_which_holds_up_others(
    world: World, lock: Lock, seen: Seen
) -> None:
    plain(world)
    other = await some_far(world.server, world.region, 2)
    await world.lock(lock)
    await world.spaces.mprotect(world.region, 0, 16 * PAGE, READ)
    assert seen.given_up == [world.region.sharers[1]]
    assert not other.detached
    other_fault = Fault(other.start, write=False, protected=False, minor=False, thread=0)
    world.server._answer(other, other_fault)
    assert world.has(0)


def poisoned(world: World, *pages: int) -> None:
    """The process has touched them while they were a hole."""
    for page in pages:
        world.touch(page * PAGE)
        assert world.window.poisoned.contains(page * PAGE)


def without_credit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is waited for a moment any more: the lanes have been late too often."""
    monkeypatch.setattr(Lane, "_left", lambda _: 0.0)


async def first_bytes(world: World, *pages: int) -> list[bytes]:
    """What the kernel reads there for the process; SIGBUS is EFAULT."""
    read = [partial(read_by_kernel, world.window.start + page * PAGE) for page in pages]
    return [await trio.to_thread.run_sync(each) for each in read]


@pytest.mark.parametrize("hidden", [False, True])
async def test_what_is_mapped_where_another_user_touched_holes_is_there_when_that_returns(
    world: World, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, *, hidden: bool
) -> None:
    nursery.start_soon(world.server.serve, world.region.sharers[1])
    poisoned(world, 0, 1, 5)
    without_credit(monkeypatch)
    new = Object(0, 16 * PAGE, syscalls.PROT_NONE if hidden else BOTH, private=False)
    await world.spaces.mmap(world.region, new, replace=False)
    if hidden:
        await world.spaces.mprotect(world.region, 0, 16 * PAGE, BOTH)
    assert await first_bytes(world, 0, 1, 5, 7) == [bytes(4)] * 4
    assert not world.window.poisoned
    assert not world.window.starved


async def test_a_file_is_there_when_it_has_been_mapped_where_another_user_touched_holes(
    world: World, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    path = directory / "file"
    path.write_bytes(b"7" * 16 * PAGE)
    nursery.start_soon(world.server.serve, world.region.sharers[1])
    poisoned(world, 0, 1, 5)
    without_credit(monkeypatch)
    # Private: nothing has to be protected before it is there, for which credit is needed.
    new = Object(0, 16 * PAGE, BOTH, private=True, file=mapped(path))
    await world.spaces.mmap(world.region, new, replace=False)
    assert await first_bytes(world, 0, 1, 5, 7) == [b"7777"] * 4
    assert not world.window.poisoned


async def test_who_is_killed_while_it_maps_a_file_leaves_nobody_with_sigbus(
    world: World, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    """What it would have waited for is done all the same."""
    path = directory / "file"
    path.write_bytes(b"7" * 16 * PAGE)
    nursery.start_soon(world.server.serve, world.region.sharers[1])
    poisoned(world, 0, 1, 5)
    right, call = world.server.poison.clear, trio.CancelScope()

    async def clear(*arguments: Any, **named: Any) -> None:
        if not named.get("empty"):
            call.cancel()
            await trio.lowlevel.checkpoint()
        await right(*arguments, **named)

    monkeypatch.setattr(world.server.poison, "clear", clear)
    new = Object(0, 16 * PAGE, BOTH, private=True, file=mapped(path))
    with call:
        await world.spaces.mmap(world.region, new, replace=False)
    assert call.cancelled_caught
    await until(lambda: not world.window.poisoned)
    assert await first_bytes(world, 0, 1, 5, 7) == [b"7777"] * 4


async def test_who_maps_does_not_wait_for_another_users_process_that_hangs(
    world: World, lock: Lock, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs whenever its page is to come, which nobody can know before."""
    right, hung = uffd.map_present, []

    def hang(fd: int, start: int, length: int, *, protect: bool = False) -> tuple[int, Outcome]:
        hung.append(start)
        lock.wait()
        return right(fd, start, length, protect=protect)

    poisoned(world, *range(0, 16, 2))
    without_credit(monkeypatch)
    monkeypatch.setattr(uffd, "map_present", hang)
    await world.spaces.mmap(world.region, Object(0, 16 * PAGE, BOTH, private=False), replace=False)
    assert len(hung) == 1, "it is waited for once, and not for each of its pages"
    assert world.window.starved, "and it is gone on with later"
    assert seen.given_up == []


async def test_what_was_poisoned_again_while_its_page_came_stays_known(
    world: World, lock: Lock, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unmapped, and touched once more: only who knows of the marker can take it away."""
    monkeypatch.setattr(lanes_module, "PATIENCE", HANG_SECONDS)
    right, begun = uffd.map_present, threading.Event()

    def slowly(fd: int, start: int, length: int, *, protect: bool = False) -> tuple[int, Outcome]:
        result = right(fd, start, length, protect=protect)
        begun.set()
        lock.wait()
        return result

    poisoned(world, 0)
    without_credit(monkeypatch)
    monkeypatch.setattr(uffd, "map_present", slowly)
    new = Object(0, PAGE, BOTH, private=False)
    async with trio.open_nursery() as calls:
        calls.start_soon(partial(world.spaces.mmap, world.region, new, replace=False))
        await until(begun.is_set)
        await world.spaces.munmap(world.region, 0, PAGE)
        # What the lane does after that is done by hand.
        poison, done = world.window.poison, Outcome.DONE
        monkeypatch.setattr(world.window, "poison", lambda *_: done)
        poisoned(world, 0)
        monkeypatch.setattr(world.window, "poison", poison)
        lock.opened.set()
    assert world.window.poisoned.contains(0)


def test_no_user_takes_the_time_that_is_another_users() -> None:
    async def wait() -> None:
        waits = Waits()
        for _ in range(3):
            with waits.on(OTHER):
                await trio.sleep_forever()
        assert trio.current_time() - since == lanes_module.PATIENCE
        assert waits.left(OTHER) == 0.0
        assert waits.left(OTHER + 1) == lanes_module.PATIENCE
        with waits.on(OTHER + 1):
            await trio.sleep(0.5)
        assert waits.left(OTHER + 1) == lanes_module.PATIENCE - 0.5

    clock = trio.testing.MockClock(autojump_threshold=0)
    since = clock.current_time()
    trio.run(wait, clock=clock)


async def test_who_hurts_nobody_is_left_alone(world: World, lock: Lock, seen: Seen) -> None:
    plain(world)
    await world.lock(lock)
    world.touch(0)
    world.window.wake(0, PAGE)
    await trio.sleep(2 * lanes_module.PATIENCE)
    assert seen.given_up == []
    lock.opened.set()
    await until(lambda: not world.far.is_late)


async def test_many_users_who_are_late_hold_up_a_start_as_one_does(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    async def late(_lane: Lane, _owner: object, _function: object, seconds: float) -> object:
        waited.append(seconds)
        raise LateError(under_way=True)

    monkeypatch.setattr(Lane, "ask", late)
    for uid in range(OTHER + 1, OTHER + 9):
        sharer = Sharer(uid, world.region, 0, uid, True, -1)
        (await world.server.lanes.fetch(sharer, lambda: -1)).close()
    assert len(waited) == 8
    assert sum(waited) <= lanes_module.FETCH_ALL_SECONDS
