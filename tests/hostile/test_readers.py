"""Who may only read a region changes nothing of what its owner has.

What a reader is given may be mapped once more, without anybody's being told.  A touch
there must not put zeros where a file's contents or hidden memory belong, must not keep
what is written from its file, and must not have a region hold more than its owner may.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from bare import Bare, Child, in_child
from conftest import BASE, Client, Daemon, clients, eventually
from hostile import MALLORY, MiB, userfaultfd
from victim import ALICE
from walls import Make, Walls
from walls import make_walls_fixture as _make_walls_fixture  # noqa: F401 - what tests ask for
from walls import own_shm as _own_shm  # noqa: F401 - as above
from walls import programs_fixture as _programs_fixture  # noqa: F401 - as above

from msharefsd.control.wire import Op, RequestFlag
from msharefsd.linux import syscalls

pytestmark = pytest.mark.shm_only
PAGE = syscalls.PAGE
SIZE = 64 * MiB
LIMIT = 8 * MiB
PAGES = 16
SHARED_FILE, PRIVATE_FILE, MEMORY, HIDDEN, HOLE = 0, 16, 32, 48, 2048
"""Where things are, in pages; PAGES of each."""
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
CONFIG = f'[limits.user.{ALICE}]\nmemory = "{LIMIT >> 20}M"\n'

At = int
"""An address of a mapping of the whole region."""


def _load(at: At, offset: int) -> None:
    ctypes.c_char.from_address(at + offset).value  # noqa: B018 - it is touched


def _store(at: At, offset: int) -> None:
    ctypes.c_char.from_address(at + offset).value = b"m"


def _populate(at: At, offset: int) -> None:
    with contextlib.suppress(OSError):
        syscalls.madvise(at + offset, PAGE, syscalls.MADV_POPULATE_READ)


def _lock(at: At, offset: int) -> None:
    ctypes.CDLL(None).mlock(ctypes.c_void_p(at + offset), PAGE)


def _system_call(at: At, offset: int) -> None:
    reader, writer = os.pipe()
    with contextlib.suppress(OSError):
        os.write(writer, (ctypes.c_char * 1).from_address(at + offset))
    os.close(reader)
    os.close(writer)


def _memory_file(at: At, offset: int) -> None:
    fd = os.open("/proc/self/mem", os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.pread(fd, PAGE, at + offset)
    os.close(fd)


def _huge(at: At, offset: int) -> None:
    with contextlib.suppress(OSError):
        syscalls.madvise(at + offset & -(2 * MiB), 2 * MiB, syscalls.MADV_COLLAPSE)


SHARED, PRIVATE = mmap.MAP_SHARED, mmap.MAP_PRIVATE
WAYS: dict[str, tuple[int, int, Callable[[At, int], object]]] = {
    "load, shared": (SHARED, 1, _load),
    "load, private": (PRIVATE, 1, _load),
    "store, private": (PRIVATE, 3, _store),
    "populate": (SHARED, 1, _populate),
    "mlock": (PRIVATE, 1, _lock),
    "system call": (SHARED, 1, _system_call),
    "/proc/self/mem": (PRIVATE, 1, _memory_file),
    "huge page": (SHARED, 1, _huge),
}


class Stage:
    """Alice's region with everything in it, and mallory, who may read it."""

    def __init__(self, walls: Walls, alice: Client, directory: Path) -> None:
        self.walls = walls
        self.daemon: Daemon = walls.daemon
        self.alice = alice
        self.file = directory / "hers"
        self.file.write_bytes(b"F" * PAGES * PAGE)
        os.chown(self.file, ALICE, ALICE)
        self.file.chmod(0o600)
        alice.ok("mshare", "good", BASE, SIZE, CREATE, 0o600)
        (self.daemon.mount / "good").chmod(0o644)
        length, fixed = PAGES * PAGE, 0x10
        for at, flags in ((SHARED_FILE, SHARED), (PRIVATE_FILE, PRIVATE)):
            alice.ok("mmap", self.at(at), length, 3, flags | fixed, self.file, os.O_RDWR, 0)
        for at, value in ((MEMORY, 7), (HIDDEN, 9)):
            alice.ok("mmap", self.at(at), length, 3, SHARED | fixed)
            alice.ok("fill", self.at(at), length, value)
        alice.ok("mprotect", self.at(HIDDEN), length, 0)

    @staticmethod
    def at(page: int) -> int:
        return BASE + page * PAGE

    def mallory(self, touch: Callable[[Bare], object]) -> Child:
        """She attaches it as a reader, and does something with what she gets."""

        def read() -> None:
            one = Bare(self.daemon.mount)
            proof = os.open(self.daemon.mount / "good", os.O_RDONLY)
            own = userfaultfd(self.daemon.mount, proof)
            answer = one.call(
                Op.ATTACH, proof, own, oflags=os.O_RDONLY, flags=RequestFlag.AS_IT_LIES
            )
            assert answer.error == 0, answer
            one.backing, one.start, one.size, one.uffd = answer.fd, answer.start, answer.size, own
            touch(one)

        return in_child(read, uid=MALLORY)

    def check(self, *, written: bool) -> None:
        """Everything of hers is as it should be."""
        alice, length = self.alice, PAGES * PAGE
        f = str(ord("F"))
        for page in range(SHARED_FILE, PRIVATE_FILE + PAGES):
            assert alice.do("load", self.at(page)) == f, page
        assert alice.do("scan", self.at(MEMORY), length) == "7"
        alice.ok("mprotect", self.at(HIDDEN), length, 3)
        assert alice.do("scan", self.at(HIDDEN), length) == "9"
        alice.ok("mprotect", self.at(HIDDEN), length, 0)
        assert alice.do("load", self.at(HOLE)) == "SIGBUS"
        assert alice.do("from_memory", self.at(HOLE + 1), PAGE) != str(PAGE)
        if written:
            for page in range(PAGES):
                alice.ok("store", self.at(SHARED_FILE + page), ord("w"))
            alice.ok("msync", self.at(SHARED_FILE), length, syscalls.MS_SYNC)
            for page in range(PAGES):
                found = self.file.read_bytes()[page * PAGE : (page + 1) * PAGE]
                assert found == b"w" + b"F" * (PAGE - 1), page
        held = int(self.daemon.field("good", "memory"))
        assert held <= LIMIT, f"{held >> 20} MiB"


def everything(one: Bare, kind: int, prot: int, touch: Callable[[At, int], object]) -> None:
    """Touch every page that may be absent, in a mapping of her own."""
    try:
        at = syscalls.mmap(None, one.size, prot, kind, one.backing, 0)
    except OSError:
        return  # she was given nothing that can be mapped: as good
    for page in (*range(HIDDEN + PAGES), HOLE, HOLE + 1, *range(4096, 8192)):
        touch(at, page * PAGE)


@pytest.mark.parametrize("way", WAYS)
def test_a_reader_who_touches_a_mapping_of_her_own(
    way: str, make_walls: Make, client_program: Path, directory: Path
) -> None:
    walls = make_walls(config=CONFIG)
    walls.daemon.expected.append(r"may have \d+M? memory|no memory for a fault|where none belong")
    with clients(client_program, walls.daemon) as start:
        alice = start(user=ALICE, group=ALICE, extra_groups=[])
        stage = Stage(walls, alice, directory)
        child = stage.mallory(lambda one: everything(one, *WAYS[way]))
        assert child.wait() == 0
        stage.check(written=True)
        os.unlink(walls.daemon.mount / "good")


def test_a_reader_who_touches_while_the_daemon_is_away(
    make_walls: Make, client_program: Path, directory: Path
) -> None:
    """The next one has no memory of its own of what was there."""
    walls = make_walls(config=CONFIG)
    walls.daemon.expected.append(r"may have \d+M? memory|no memory for a fault|where none belong")
    with clients(client_program, walls.daemon) as start:
        alice = start(user=ALICE, group=ALICE, extra_groups=[])
        stage = Stage(walls, alice, directory)
        attached, away, done = os.pipe(), os.pipe(), os.pipe()

        def later(one: Bare) -> None:
            os.write(attached[1], b"x")
            os.read(away[0], 1)
            for kind, prot, touch in WAYS.values():
                everything(one, kind, prot, touch)
            os.write(done[1], b"x")

        child = stage.mallory(later)
        for end in (attached[1], done[1]):
            os.close(end)
        assert os.read(attached[0], 1) == b"x"
        walls.killed()
        os.write(away[1], b"x")
        assert os.read(done[0], 1) == b"x"
        walls.started()
        stage.check(written=True)
        child.kill()
        for end in (attached[0], *away, done[0]):
            os.close(end)
        os.unlink(walls.daemon.mount / "good")


def test_a_reader_who_goes_on_touching_when_alice_has_nothing_more(
    make_walls: Make, client_program: Path, directory: Path
) -> None:
    """What she makes of holes is given back when it is noticed, or never comes to be."""
    walls = make_walls(config=CONFIG)
    walls.daemon.expected.append(r"may have \d+M? memory|no memory for a fault|where none belong")
    with clients(client_program, walls.daemon) as start:
        alice = start(user=ALICE, group=ALICE, extra_groups=[])
        stage = Stage(walls, alice, directory)
        child = stage.mallory(lambda one: everything(one, SHARED, 1, _populate))
        assert child.wait() == 0
        alice.ok("munmap", BASE, SIZE)
        eventually(
            lambda: int(walls.daemon.field("good", "memory")) <= LIMIT, "the memory is given back"
        )
        alice.ok("mmap", BASE, PAGES * PAGE, 3, SHARED | 0x10)
        alice.ok("fill", BASE, PAGES * PAGE, 5)
        assert alice.do("scan", BASE, PAGES * PAGE) == "5"
        os.unlink(walls.daemon.mount / "good")
