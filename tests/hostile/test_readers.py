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
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bare import Bare, Child, in_child
from conftest import BASE, Client, Daemon, clients, eventually, huge_pages
from hostile import MALLORY, MiB, userfaultfd
from victim import ALICE
from walls import Make, Walls, userfaultfd_for_all
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

    def __init__(
        self, walls: Walls, alice: Client, directory: Path, *, mapped: bool = True
    ) -> None:
        """Without `mapped` there is nothing in it until `map`."""
        self.walls = walls
        self.daemon: Daemon = walls.daemon
        self.alice = alice
        self.file = directory / "hers"
        self.file.write_bytes(b"F" * PAGES * PAGE)
        os.chown(self.file, ALICE, ALICE)
        self.file.chmod(0o600)
        alice.ok("mshare", "good", BASE, SIZE, CREATE, 0o600)
        (self.daemon.mount / "good").chmod(0o644)
        if mapped:
            self.map()

    def map(self) -> None:
        """Have everything in it."""
        alice = self.alice
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


@contextlib.contextmanager
def a_stage(
    make_walls: Make, client_program: Path, directory: Path, *, mapped: bool = True
) -> Iterator[tuple[Stage, Callable[..., Client]]]:
    """Alice's region, and how to have more clients."""
    walls = make_walls(config=CONFIG)
    walls.daemon.expected.append(r"may have \d+M? memory|no memory for a fault|where none belong")
    with clients(client_program, walls.daemon) as start:
        alice = start(user=ALICE, group=ALICE, extra_groups=[])
        yield Stage(walls, alice, directory, mapped=mapped), start
        os.unlink(walls.daemon.mount / "good")


@contextlib.contextmanager
def going_on(stage: Stage, pages: range, *, pause: float = 0.001) -> Iterator[None]:
    """Mallory touches those pages again and again."""
    begun, ready = os.pipe()

    def touch(one: Bare) -> None:
        at = syscalls.mmap(None, one.size, 1, SHARED, one.backing, 0)
        os.write(ready, b"x")
        while True:
            for page in pages:
                _populate(at, page * PAGE)
            time.sleep(pause)

    child = stage.mallory(touch)
    assert os.read(begun, 1)
    try:
        yield
        assert child.poll() is None
    finally:
        child.kill()
        os.close(begun)
        os.close(ready)


def flags_at(client: Client, address: int) -> set[str]:
    """VmFlags of the mapping at an address (proc_pid_smaps(5))."""
    here = False
    for line in Path(f"/proc/{client.pid}/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            start, _, end = first.partition("-")
            here = int(start, 16) <= address < int(end, 16)
        elif here and first == "VmFlags:":
            return set(line.split()[1:])
    raise AssertionError


def test_what_is_mapped_when_a_reader_is_there_already(
    make_walls: Make, client_program: Path, directory: Path
) -> None:
    with a_stage(make_walls, client_program, directory, mapped=False) as (stage, start):
        pages = range(HIDDEN + PAGES)
        with going_on(stage, pages):
            stage.map()
            stage.check(written=True)
        # What is plain memory now is nobody's to be asked about.
        assert "ui" in flags_at(stage.alice, stage.at(HOLE))
        assert "ui" in flags_at(stage.alice, stage.at(SHARED_FILE))
        assert not {"ui", "uw"} & flags_at(stage.alice, stage.at(MEMORY))
        assert "um" in flags_at(stage.alice, stage.at(MEMORY))
        del start


def test_a_child_of_a_reader_has_no_more_than_the_reader(
    make_walls: Make, client_program: Path, directory: Path
) -> None:
    with a_stage(make_walls, client_program, directory) as (stage, _):

        def fork(one: Bare) -> None:
            child = in_child(lambda: everything(one, SHARED, 1, _load))
            assert child.wait() == 0

        assert stage.mallory(fork).wait() == 0
        stage.check(written=True)


def test_memory_that_is_hidden_and_shown_again_all_the_time(
    make_walls: Make, client_program: Path, directory: Path
) -> None:
    with a_stage(make_walls, client_program, directory) as (stage, start):
        other = start(user=ALICE, group=ALICE, extra_groups=[])
        other.ok("mshare", "good", BASE, SIZE, os.O_RDWR, 0)
        alice, length = stage.alice, PAGES * PAGE
        with going_on(stage, range(HIDDEN + PAGES), pause=0):
            for number in range(30):
                for at, value in ((MEMORY, 7), (HIDDEN, 9)):
                    alice.ok("mprotect", stage.at(at), length, 0)
                    assert other.do("load", stage.at(at)) == "SIGSEGV"
                    assert other.do("from_memory", stage.at(at), 1) != "1"
                    alice.ok("mprotect", stage.at(at), length, 3 if number % 2 else 1)
                    assert other.do("scan", stage.at(at), length) == str(value)
                    if number % 2:
                        alice.ok("store", stage.at(at) + number % PAGES * PAGE, value)
                private = stage.at(PRIVATE_FILE)
                other.ok("store", private + number % PAGES * PAGE, ord("F"))
                alice.ok("mprotect", private, length, 0)
                alice.ok("mprotect", private, length, 3)
                if number % 3 == 0:
                    alice.ok("madvise", private, length, mmap.MADV_DONTNEED)
                assert other.do("scan", private, length) == str(ord("F"))
            for at in (MEMORY, HIDDEN):
                alice.ok("mprotect", stage.at(at), length, 3)
        alice.ok("mprotect", stage.at(HIDDEN), length, 0)
        stage.check(written=True)


def test_a_page_that_was_hidden_by_itself_comes_where_others_were_not(
    make_walls: Make, client_program: Path, directory: Path
) -> None:
    """It is a VMA by itself, and what would come with it lies in others."""
    with a_stage(make_walls, client_program, directory, mapped=False) as (stage, start):
        alice, page = stage.alice, stage.at(MEMORY + 1)
        other = start(user=ALICE, group=ALICE, extra_groups=[])
        other.ok("mshare", "good", BASE, SIZE, os.O_RDWR, 0)
        assert stage.mallory(lambda one: one.backing).wait() == 0
        alice.ok("mmap", stage.at(MEMORY), PAGES * PAGE, 3, SHARED | 0x10)
        alice.ok("store", page, 1)
        alice.ok("mprotect", page, PAGE, 0)
        alice.ok("mprotect", page, PAGE, 3)
        assert other.do("load", page) == "1"
        assert "ui" in flags_at(alice, page)
        assert "ui" not in flags_at(alice, page + PAGE)
        assert alice.do("load", page) == "1"


def test_what_is_written_to_a_private_file_stays(
    make_walls: Make, client_program: Path, directory: Path
) -> None:
    """It is nobody's to read anew."""
    with a_stage(make_walls, client_program, directory) as (stage, start):
        other = start(user=ALICE, group=ALICE, extra_groups=[])
        other.ok("mshare", "good", BASE, SIZE, os.O_RDWR, 0)
        for page in range(0, PAGES, 2):
            stage.alice.ok("store", stage.at(PRIVATE_FILE + page), page)
        with going_on(stage, range(HIDDEN + PAGES)):
            for page in range(1, PAGES, 2):
                other.ok("store", stage.at(PRIVATE_FILE + page), page)
            for round_ in range(3):
                if round_ == 1:
                    stage.walls.killed()
                    stage.walls.started()
                for client in (stage.alice, other):
                    for page in range(PAGES):
                        assert client.do("load", stage.at(PRIVATE_FILE + page)) == str(page)


def test_other_readers_are_not_told_lies_either(
    make_walls: Make, client_program: Path, directory: Path
) -> None:
    with a_stage(make_walls, client_program, directory) as (stage, start):
        before, after = (start(user=ALICE, group=ALICE, extra_groups=[]) for _ in range(2))
        before.ok("mshare", "good", BASE, SIZE, os.O_RDONLY, 0)
        assert "ui" not in flags_at(before, BASE)
        assert "ui" not in flags_at(stage.alice, stage.at(HOLE))
        child = stage.mallory(lambda one: everything(one, SHARED, 1, _load))
        assert child.wait() == 0
        stranger = start(user=ALICE + 7, group=ALICE + 7, extra_groups=[])
        for late in (after, stranger):
            late.ok("mshare", "good", BASE, SIZE, os.O_RDONLY, 0)
        for client in (before, after, stranger):
            assert "ui" in flags_at(client, BASE)
            for at in (SHARED_FILE, PRIVATE_FILE):
                assert client.do("scan", stage.at(at), PAGES * PAGE) == str(ord("F"))
            assert client.do("scan", stage.at(MEMORY), PAGES * PAGE) == "7"
            assert client.do("load", stage.at(HIDDEN)) == "SIGSEGV"
            assert client.do("load", stage.at(HOLE)) == "SIGBUS"
        stage.check(written=True)


def test_who_has_room_finds_it_whatever_a_reader_makes_of_holes(
    make_walls: Make, client_program: Path, directory: Path
) -> None:
    with a_stage(make_walls, client_program, directory) as (stage, _):
        with going_on(stage, range(2 * HOLE, SIZE // PAGE), pause=0.02):
            length = 4 * MiB

            def there_is_room() -> bool:
                """Once more; whether the reader has made more by now than there may be."""
                stage.alice.ok("mmap", stage.at(512), length, 3, SHARED | 0x10)
                stage.alice.ok("fill", stage.at(512), length, 3)
                assert stage.alice.do("scan", stage.at(512), length) == "3"
                return stage.daemon.metric("intruded_pages_total") > LIMIT // PAGE

            eventually(there_is_room, "as many pages of the reader's")
        stage.alice.ok("munmap", stage.at(512), length)
        eventually(lambda: int(stage.daemon.field("good", "memory")) <= LIMIT, "it is given back")
        stage.check(written=True)


def test_huge_pages_of_a_reader(
    make_daemon: Callable[..., Daemon], client_program: Path, directory: Path
) -> None:
    huge = 2 * MiB
    with huge_pages(24):
        daemon = make_daemon(f"--alignment={SIZE}", "--backing=hugetlb", *userfaultfd_for_all())
        daemon.expected.append("where none belong")
        daemon.start()
        path = directory / "file"
        path.write_bytes(b"F" * 2 * huge)
        with clients(client_program, daemon) as start:
            owner, other = start(), start()
            owner.ok("mshare", "good", BASE, SIZE, CREATE, 0o644)
            other.ok("mshare", "good", BASE, SIZE, os.O_RDWR, 0)
            owner.ok("mmap", BASE, 2 * huge, 3, PRIVATE | 0x10, path, os.O_RDWR, 0)
            owner.ok("mmap", BASE + 2 * huge, 2 * huge, 3, SHARED | 0x10)
            owner.ok("fill", BASE + 2 * huge, 2 * huge, 9)
            owner.ok("mprotect", BASE + 2 * huge, 2 * huge, 0)

            def read() -> None:
                one = Bare(daemon.mount)
                proof = os.open(daemon.mount / "good", os.O_RDONLY)
                own = userfaultfd(daemon.mount, proof)
                answer = one.call(
                    Op.ATTACH, proof, own, oflags=os.O_RDONLY, flags=RequestFlag.AS_IT_LIES
                )
                assert answer.error == 0, answer
                hint = syscalls.mmap(None, 2 * SIZE, 0, PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
                at = hint + -hint % SIZE
                syscalls.mmap(at, 12 * huge, 1, SHARED | 0x10, answer.fd, 0)
                for place in range(6):
                    _load(at, place * huge)

            assert in_child(read, uid=MALLORY).wait() == 0
            for client in (owner, other):
                assert client.do("load", BASE + huge) == str(ord("F"))
                assert client.do("load", BASE) == str(ord("F"))
                assert client.do("load", BASE + 2 * huge) == "SIGSEGV"
                assert client.do("load", BASE + 4 * huge) == "SIGBUS"
                assert client.do("from_memory", BASE + 5 * huge, 1) != "1"
            owner.ok("mprotect", BASE + 2 * huge, 2 * huge, 3)
            for client in (other, owner):
                assert client.do("scan", BASE + 2 * huge, 2 * huge) == "9"
            assert daemon.metric("intruded_pages_total") >= 4
            owner.ok("unlink", "good")
