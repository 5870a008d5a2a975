"""What one user can have the daemon remember, and where that would end.

Its memory is not to be had by touching holes, and the run directory, when it is full of
one user's records, has room for another's.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bare import Child, in_child
from conftest import Daemon
from hostile import CREATE, MALLORY, Attached, Evil, MiB
from walls import Make, Walls, processes_of
from walls import make_walls_fixture as _make_walls_fixture  # noqa: F401 - what tests ask for
from walls import own_shm as _own_shm  # noqa: F401 - as above
from walls import programs_fixture as _programs_fixture  # noqa: F401 - as above
from walls import walls_fixture as _walls_fixture  # noqa: F401 - as above

from msharefsd.linux import syscalls

pytestmark = pytest.mark.shm_only
PAGE = syscalls.PAGE
HOLES = 32768
SHARED, ANONYMOUS = syscalls.MAP_SHARED, syscalls.MAP_ANONYMOUS
ROOM = 2 * MiB
"""A run directory that one user's records could fill."""


def memory_of(daemon: Daemon) -> int:
    """What all its processes have for themselves (bytes)."""
    total = 0
    for pid in processes_of(daemon):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    total += int(line.split()[1]) * 1024
    return total


def records_of(daemon: Daemon) -> int:
    """What the run directory holds (bytes)."""
    return sum(
        path.lstat().st_size for path in daemon.run.rglob("*") if path.is_file() and path.exists()
    )


def steps(walls: Walls, act: Callable[[Evil], Iterator[object]]) -> Iterator[Child]:
    """Have mallory go from one step to the next, each time that we do; ends her."""
    done, say = os.pipe()
    listen, go = os.pipe()

    def run() -> None:
        evil = Evil(walls.daemon.mount, walls.directory, walls.programs.helpers, None, say)
        for _ in act(evil):
            evil.held()
            os.read(listen, 1)
        evil.held()
        os.read(listen, 1)

    child = in_child(run, uid=MALLORY, seconds=290)
    for end in (say, listen):
        os.close(end)
    try:
        while os.read(done, 1) == b"x":
            yield child
            with contextlib.suppress(BrokenPipeError):
                os.write(go, b"x")
    finally:
        child.kill()
        for end in (done, go):
            os.close(end)
        for name in os.listdir(walls.daemon.mount):
            if name.startswith("evil"):
                with contextlib.suppress(OSError):  # no room even for that: its test says so
                    os.unlink(walls.daemon.mount / name)


def touch_holes(evil: Evil) -> Iterator[None]:
    """All holes of a region, by one attachment after another."""
    one = evil.create(128 * MiB, window=False)
    yield
    for _ in range(3):
        other = evil.join(one.name)
        evil.c.once(other.start, HOLES, PAGE)
        syscalls.munmap(other.start, other.size)
        yield


@pytest.mark.timeout(300)
def test_holes_that_are_touched_are_not_remembered_page_by_page(walls: Walls) -> None:
    memory, records = [], []
    for _ in steps(walls, touch_holes):
        memory.append(memory_of(walls.daemon))
        records.append(records_of(walls.daemon))
    assert len(memory) == 5
    assert memory[3] - memory[1] < 3 * MiB // 2, [size >> 10 for size in memory]
    assert records[3] - records[1] < MiB // 4, [size >> 10 for size in records]


FILLED = 4
"""Steps of fill_records(), and its end."""


def fill_records(evil: Evil) -> Iterator[None]:
    """Everything that has to be remembered, until no more is taken."""
    held: list[Attached] = []
    refused = 0
    for number in range(500):
        try:
            os.close(os.open(evil.mount / f"evil{number:04}{'x' * 240}", CREATE, 0o600))
        except OSError:
            refused += 1
            if refused > 20:
                break
    with contextlib.suppress(OSError):
        held.append(evil.create(256 * MiB, window=False))
    yield
    for number in range(20000):
        answer = held[0].mmap(2 * number * PAGE, PAGE, 1 + 2 * (number % 2), SHARED | ANONYMOUS)
        if answer.error == errno.ENOSPC:
            break
    else:
        return  # she might go on
    yield
    with contextlib.suppress(OSError):
        other = evil.join(held[0].name)
        evil.c.once(other.start + 128 * MiB, HOLES, PAGE)
        held.append(other)
    yield


@pytest.mark.timeout(110)
def test_records_of_one_user_leave_room_for_anothers(make_walls: Make, directory: Path) -> None:
    small = directory / "small"
    small.mkdir()
    syscalls.mount("small", str(small), "tmpfs", 0, f"mode=755,size={ROOM}")

    def launch(daemon: Daemon) -> None:
        daemon.run = small / "run"
        daemon.launch()

    try:
        walls = make_walls(launch=launch)
        walls.daemon.expected.append(r"(WARNING|ERROR): .*(space|state|room|records|disk is full)")
        walls.daemon.expected.append(r"user \d+ may have")
        walls.victim()
        before = len(walls.daemon.log().splitlines())
        number = 0
        for number, _ in enumerate(steps(walls, fill_records), start=1):
            walls.all_go_on()
            walls.victim(name=f"new {number}", start=0x2100_0000_0000 + (number << 40))
        assert number == FILLED, "she was never told that her records have no more room"
        assert "Traceback" not in walls.daemon.log()
        assert len(walls.daemon.log().splitlines()) - before < 100
        walls.killed()
        walls.started()
        walls.all_go_on()
        for each in walls.victims:
            each.end()
            os.unlink(walls.daemon.mount / each.name)
        walls.daemon.stop()
    finally:
        syscalls.umount(str(small), syscalls.MNT_DETACH)
