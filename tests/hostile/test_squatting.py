"""Whoever takes the names in /dev/shm that the daemon may want gets nothing by it.

Everybody may make files there, and see what others have.  No region is lost for that, no
next daemon is kept from starting, and nothing of the squatter's is taken for memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bare import in_child
from conftest import ALIGNMENT, BASE, Client, Daemon, clients
from hostile import MALLORY
from victim import ALICE
from walls import Make, Walls
from walls import make_walls_fixture as _make_walls_fixture  # noqa: F401 - what tests ask for
from walls import own_shm as _own_shm  # noqa: F401 - as above
from walls import programs_fixture as _programs_fixture  # noqa: F401 - as above
from walls import walls_fixture as _walls_fixture  # noqa: F401 - as above

pytestmark = pytest.mark.shm_only
SHM = Path("/dev/shm")
SIZE = 2 * ALIGNMENT
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
NEXT = 40
"""How many numbers of regions are taken that nobody has yet."""


def _file(path: Path) -> None:
    path.write_bytes(b"mallory" * 1000)


def _empty(path: Path) -> None:
    os.close(os.open(path, CREATE, 0o600))


def _for_all(path: Path) -> None:
    path.write_bytes(b"mallory" * 1000)
    path.chmod(0o666)


def _full_directory(path: Path) -> None:
    path.mkdir()
    (path / "file").touch()


def _socket(path: Path) -> None:
    short = path.with_name(f"s{os.getpid()}")  # an address has 107 bytes
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(short))
    short.rename(path)


KINDS: dict[str, Callable[[Path], object]] = {
    "file": _file,
    "empty file": _empty,
    "file for all": _for_all,
    "directory": lambda path: path.mkdir(0o700),
    "full directory": _full_directory,
    "fifo": os.mkfifo,
    "link to a file": lambda path: path.symlink_to("/etc/passwd"),
    "link to nothing": lambda path: path.symlink_to("/dev/shm/made-by-mallory"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "socket": _socket,
}
SOME = ("empty file", "file for all", "directory", "fifo", "link to nothing")


def wanted(daemon: Daemon) -> set[str]:
    """Every name that the daemon may want, as far as one can tell from outside."""
    digest = hashlib.sha256(os.fsencode(daemon.run)).hexdigest()
    prefixes = {f"msharefs-{digest[:8]}-", "msharefs-"}
    names, numbers = set(), {1}
    for name in os.listdir(SHM):
        names |= {name + end for end in ("-stash", ".stash", "-new", ".new", "~", "-0", "-1")}
        match = re.fullmatch(r"(.*?)(\d+)(-stash)?", name)
        if match is not None and len(match[2]) < 10:
            prefixes.add(match[1])
            numbers.add(int(match[2]))
    for name in os.listdir(daemon.mount):
        number = os.stat(daemon.mount / name).st_ino
        numbers |= {number, number // 8}
    last = max(numbers)
    numbers |= set(range(last, last + NEXT)) | {99999}
    names |= {
        f"{prefix}{number}{end}"
        for prefix in prefixes
        for number in numbers
        for end in ("", "-stash")
    }
    return names - set(os.listdir(SHM))


Squat = Callable[[Daemon, Callable[[Path], object]], set[str]]


@pytest.fixture(name="squat")
def squat_fixture(make_daemon: Callable[..., Daemon], own_shm: None) -> Iterator[Squat]:
    """Have mallory take all names; an administrator takes them away in the end."""
    taken: set[str] = set()

    def squat(daemon: Daemon, make: Callable[[Path], object]) -> set[str]:
        names = wanted(daemon)

        def take() -> None:
            for name in names:
                make(SHM / name)

        taken.update(names)
        assert in_child(take, uid=MALLORY).wait() == 0
        return names

    yield squat
    for name in taken:
        path = SHM / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            with contextlib.suppress(FileNotFoundError):
                if path.lstat().st_uid == MALLORY:
                    path.unlink()


def complaints(walls: Walls) -> None:
    """It may say so, as long as it is about what mallory made."""
    walls.daemon.expected.append(r"WARNING: .*(removed|remove|shared memory|/dev/shm)")


@pytest.mark.timeout(110)
@pytest.mark.parametrize("kind", KINDS)
def test_names_that_are_taken_while_the_daemon_runs(kind: str, walls: Walls, squat: Squat) -> None:
    """Alice hides a page, provokes EFAULT, and makes a second region; then come the next
    daemons, after a crash and after an upgrade."""
    complaints(walls)
    squat(walls.daemon, KINDS[kind])
    walls.all_go_on()
    walls.victim(name="second", start=0x2100_0000_0000)
    walls.killed()
    walls.started()
    walls.all_go_on()
    squat(walls.daemon, KINDS[kind])
    assert walls.daemon.process is not None
    walls.daemon.process.send_signal(signal.SIGHUP)
    assert walls.daemon.process.wait(20) == 0
    walls.started()
    walls.all_go_on()
    walls.victim(name="third", start=0x2200_0000_0000)
    assert not (SHM / "made-by-mallory").exists()


@pytest.mark.timeout(110)
@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize(
    ("number", "stash"), [(signal.SIGHUP, False), (signal.SIGHUP, True), (signal.SIGKILL, False)]
)
def test_memory_of_a_region_that_nobody_has_attached(
    kind: str,
    number: signal.Signals,
    stash: bool,
    make_walls: Make,
    squat: Squat,
    client_program: Path,
) -> None:
    """Only the daemon knows of it: what mallory makes must not have it taken for lost."""
    walls = make_walls()
    complaints(walls)
    as_alice = {"user": ALICE, "group": ALICE, "extra_groups": ()}
    with clients(client_program, walls.daemon) as start:
        alice: Client = start(**as_alice)
        alice.ok("mshare", "good", BASE, SIZE, CREATE, 0o600)
        alice.ok("mmap", BASE, SIZE, 3, 1 | 0x10)
        alice.ok("fill", BASE, ALIGNMENT, 7)
        if stash:  # what is hidden has to be somewhere else
            alice.ok("mprotect", BASE, ALIGNMENT // 2, 0)
        alice.kill()
        squat(walls.daemon, KINDS[kind])
        assert walls.daemon.process is not None
        walls.daemon.process.send_signal(number)
        walls.daemon.process.wait(20)
        walls.started()
        again: Client = start(**as_alice)
        again.ok("mshare", "good", BASE, SIZE, os.O_RDWR, 0)
        again.ok("mprotect", BASE, ALIGNMENT // 2, 3)
        assert again.do("scan", BASE, ALIGNMENT) == "7"
        again.kill()
    os.unlink(walls.daemon.mount / "good")


@pytest.mark.timeout(110)
@pytest.mark.parametrize("kind", KINDS)
def test_names_that_are_taken_before_the_first_daemon(
    kind: str, make_daemon: Callable[..., Daemon], squat: Squat
) -> None:
    daemon = make_daemon(f"--alignment={ALIGNMENT}")
    daemon.expected.append(r"WARNING: .*(removed|remove|shared memory|/dev/shm)")
    daemon.mount.mkdir()
    squat(daemon, KINDS[kind])
    daemon.start()


def test_what_mallory_makes_is_never_opened_as_memory(walls: Walls, squat: Squat) -> None:
    """Neither what it holds comes into a region, nor does a region's memory go into it."""
    complaints(walls)
    names = squat(walls.daemon, _for_all)
    for _ in range(2):
        walls.all_go_on()
        walls.killed()
        walls.started()
    walls.all_go_on()
    for name in names & set(os.listdir(SHM)):
        status = os.stat(SHM / name)
        if status.st_uid == MALLORY:
            assert (SHM / name).read_bytes() == b"mallory" * 1000


def test_a_run_directory_is_nothing_that_others_have_made(
    make_daemon: Callable[..., Daemon], own_shm: None
) -> None:
    """In a place where everybody may make names: a directory or a link of mallory's."""
    place = Path(tempfile.mkdtemp(prefix="mshare-test-"))
    place.chmod(0o1777)
    try:
        for kind in ("directory", "link to a file", "file", "fifo", "socket"):
            daemon = make_daemon(f"--alignment={ALIGNMENT}")
            daemon.run = place / kind.replace(" ", "-")
            assert in_child(lambda: KINDS[kind](daemon.run), uid=MALLORY).wait() == 0  # noqa: B023 - called at once
            daemon.launch()
            assert daemon.process is not None
            assert daemon.process.wait(20) != 0
            daemon.expected.append("ERROR: ")
            daemon.process = None
    finally:
        shutil.rmtree(place)
