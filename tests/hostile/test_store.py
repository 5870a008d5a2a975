"""Files that are mapped survive the daemon, whoever keeps their descriptors meanwhile.

And whatever somebody else has kept there: a store that is full is nobody's loss.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bare import Child, in_child
from conftest import eventually
from hostile import MALLORY, Attached, Evil
from manager import ServiceManager
from victim import ALICE
from walls import Make, Walls
from walls import make_walls_fixture as _make_walls_fixture  # noqa: F401 - what tests ask for
from walls import own_shm as _own_shm  # noqa: F401 - as above
from walls import programs_fixture as _programs_fixture  # noqa: F401 - as above

from msharefsd.control.wire import Op
from msharefsd.linux import syscalls

pytestmark = pytest.mark.shm_only
PAGE = syscalls.PAGE
MOST = 20
SHARED = syscalls.MAP_SHARED


@pytest.fixture
def manager(directory: Path) -> Iterator[ServiceManager]:
    """To be asked for before a daemon, which it has to outlive."""
    made = ServiceManager(directory, MOST)
    yield made
    made.close()


class Two:
    """A process that does something, waits for a restart, and looks."""

    def __init__(
        self,
        walls: Walls,
        uid: int,
        before: Callable[[Evil], Attached],
        after: Callable[[Attached], None] | None = None,
    ) -> None:
        self.ready, said = os.pipe()
        go, self.go = os.pipe()
        daemon = walls.daemon

        def run() -> None:
            evil = Evil(daemon.mount, walls.directory, walls.programs.helpers, None, said)
            one = before(evil)
            evil.held()
            os.read(go, 1)
            if after is not None:
                syscalls.munmap(one.start, one.size)
                after(evil.join(one.name))

        self.child: Child = in_child(run, uid=uid)
        os.close(said)
        os.close(go)
        assert os.read(self.ready, 1) == b"x"

    def end(self) -> None:
        os.write(self.go, b"x")
        assert self.child.wait() == 0
        os.close(self.go)
        os.close(self.ready)


def check(path: Path) -> Callable[[Attached], None]:
    """The file is there at both places, and what is written there comes into it."""

    def look(one: Attached) -> None:
        assert one.byte(0) == one.byte(4 * PAGE) == ord("F")
        ctypes.memset(one.start + 4 * PAGE, ord("w"), 1)
        assert one.call(Op.MSYNC, objects=((4 * PAGE, PAGE, 0, 0, 0),)).error == 0
        assert path.read_bytes()[:2] == b"wF"

    return look


def map_twice(path: Path, *, twice_open: bool) -> Callable[[Evil], Attached]:
    """As any program might: it opens a file once, or twice, and maps two parts of it."""

    def run(evil: Evil) -> Attached:
        one = evil.create()
        file = os.open(path, os.O_RDWR)
        assert one.mmap(0, PAGE, 3, SHARED, file).error == 0
        if twice_open:
            os.close(file)
            file = os.open(path, os.O_RDWR)
        assert one.mmap(4 * PAGE, PAGE, 3, SHARED, file).error == 0
        os.close(file)
        return one

    return run


@pytest.mark.parametrize("twice_open", [False, True])
@pytest.mark.parametrize("kept", ["alone", "systemd"])
def test_a_file_that_is_mapped_twice_survives_the_daemon(
    kept: str, twice_open: bool, manager: ServiceManager, make_walls: Make, directory: Path
) -> None:
    path = directory / "file"
    path.write_bytes(b"F" * 8 * PAGE)
    path.chmod(0o666)
    launch = manager.launch if kept == "systemd" else None
    walls = make_walls(launch=launch)
    alice = Two(walls, ALICE, map_twice(path, twice_open=twice_open), check(path))
    for _ in range(2):
        walls.killed()
        walls.started()
    alice.end()
    clear(walls)


def clear(walls: Walls) -> None:
    """Take all names away; what they had is let go."""
    for name in os.listdir(walls.daemon.mount):
        if name.startswith("evil"):
            os.unlink(walls.daemon.mount / name)


def test_a_store_that_somebody_fills_is_not_anothers_loss(
    manager: ServiceManager, make_walls: Make, directory: Path
) -> None:
    """FileDescriptorStoreMax= is for all, and nobody is told that it is reached."""
    path = directory / "file"
    path.write_bytes(b"F" * 8 * PAGE)
    path.chmod(0o666)
    walls = make_walls(launch=manager.launch)

    def fill(evil: Evil) -> Attached:
        one = evil.create()
        for number in range(3 * MOST):
            file = os.open(path, os.O_RDWR)
            one.mmap(2 * number * PAGE, PAGE, 3, SHARED, file)  # or she may not: as good
            os.close(file)
        return one

    mallory = Two(walls, MALLORY, fill)
    alice = Two(walls, ALICE, map_twice(path, twice_open=True), check(path))
    walls.killed()
    walls.started()
    alice.end()
    mallory.end()
    clear(walls)
    eventually(lambda: len(manager.stored) <= 2, "what was kept is let go")


def test_hundreds_of_mappings_cost_the_manager_little(
    manager: ServiceManager, make_walls: Make, directory: Path
) -> None:
    """It compares each descriptor that it is given with all that it has."""
    manager.most = 65536
    path = directory / "file"
    path.write_bytes(b"F" * 8 * PAGE)
    path.chmod(0o666)
    walls = make_walls(launch=manager.launch)
    before = len(manager.stored)

    def fill(evil: Evil) -> Attached:
        one = evil.create(8 << 20)
        for number in range(300):
            file = os.open(path, os.O_RDWR)
            assert one.mmap(2 * number * PAGE, PAGE, 3, SHARED, file).error == 0
            os.close(file)
        return one

    mallory = Two(walls, MALLORY, fill)
    assert len(manager.stored) - before < 100, "a store of its own is what they belong in"
    mallory.end()
    clear(walls)
