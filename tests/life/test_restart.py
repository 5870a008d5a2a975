"""The daemon is killed, wherever it may be, and the next one goes on.

Nothing is lost, nothing is torn, nobody reads zeros from a page that was filled, and
every call that was under way comes to its end.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import random
import signal
import sqlite3
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from bare import Bare, in_child
from conftest import (
    ALIGNMENT,
    BASE,
    SUPPORT,
    Client,
    Daemon,
    clients,
    compile_c,
    eventually,
    huge_pages,
    taken_down,
    temporary,
    watched,
)
from stops import arm, may_stop, reached, stopped

from msharefsd.control.wire import Op, RequestFlag
from msharefsd.linux import mounts, syscalls, uffd

SIZE = 4 * ALIGNMENT
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
SHARED = mmap.MAP_SHARED
PRIVATE = mmap.MAP_PRIVATE
FIXED = 0x10
NOREPLACE = 0x100000
ANONYMOUS = mmap.MAP_ANONYMOUS
READ, WRITE = 1, 2
PAGE = 4096
FILE = 64 * PAGE
KILLS = int(os.environ.get("MSHARE_KILLS", "20"))
STALE = "taking down the mount"
LACKS = "does not know of memory of user 0's regions"


def often(directory: Path) -> str:
    """Have memory collapsed as often as can be."""
    settings = directory / "settings.toml"
    settings.write_text("collapse_seconds = 0.2\n")
    return f"--config={settings}"


def launch_parked(daemon: Daemon, barrier: str) -> None:
    daemon.launch(env={**os.environ, "MSHAREFSD_PARK": barrier})


def parked(daemon: Daemon) -> None:
    """Wait until the daemon has come to its barrier, and kill it there."""
    eventually(lambda: any(map(stopped, daemon.processes())), "the barrier")
    daemon.kill()


@dataclass
class Stage:
    """A region with everything in it, and two sharers that have filled it."""

    daemon: Daemon
    first: Client
    second: Client
    directory: Path
    start: Callable[..., Client]
    shared: Path = field(init=False)
    private: Path = field(init=False)
    left: bool = field(init=False, default=True)
    """Nothing is there of what was set up."""

    # Offsets in pages; lengths of 16, files' of 64.
    MEMORY, SHARED, PRIVATE, HIDDEN, CONSTANT, HOLE = 0, 64, 128, 192, 256, 320

    def at(self, offset: int) -> int:
        return BASE + offset * PAGE

    def set_up(self) -> None:
        self.left = False
        self.shared, self.private = self.directory / "shared", self.directory / "private"
        for path, byte in ((self.shared, b"s"), (self.private, b"p")):
            path.write_bytes(byte * FILE)
        first = self.first
        first.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        self.second.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        length = 16 * PAGE
        for offset, value in ((self.MEMORY, 7), (self.HIDDEN, 9), (self.CONSTANT, 11)):
            first.ok("mmap", self.at(offset), length, READ | WRITE, SHARED | FIXED)
            first.ok("fill", self.at(offset), length, value)
        first.ok("mprotect", self.at(self.HIDDEN), length, 0)
        first.ok("mprotect", self.at(self.CONSTANT), length, READ)
        first.ok("mmap", self.at(self.SHARED), FILE, 3, SHARED | FIXED, self.shared, os.O_RDWR, 0)
        first.ok(
            "mmap", self.at(self.PRIVATE), FILE, 3, PRIVATE | FIXED, self.private, os.O_RDONLY, 0
        )
        # One page of each file has been seen, and one written to.
        for offset in (self.SHARED, self.PRIVATE):
            first.ok("store", self.at(offset), 1)
            assert self.second.do("load", self.at(offset)) == "1"

    def check(self, *, without: int = -1) -> None:
        """Both sharers see all of it, as it was; but what the test has changed itself."""
        for client in (self.first, self.second):
            for offset, value in ((self.MEMORY, "7"), (self.CONSTANT, "11")):
                if offset != without:
                    assert client.do("scan", self.at(offset), 16 * PAGE) == value, offset
                    assert client.do("load", self.at(offset)) == value
            if without != self.HIDDEN:
                assert client.do("load", self.at(self.HIDDEN)) == "SIGSEGV"
            assert client.do("load", self.at(self.HOLE)) == "SIGBUS"
            for offset, byte in ((self.SHARED, b"s"), (self.PRIVATE, b"p")):
                if offset != without:
                    assert client.do("load", self.at(offset)) == "1"
                    for at in (1, PAGE, FILE - PAGE):
                        assert client.do("load", self.at(offset) + at) == str(byte[0])
            assert client.do("store", self.at(self.CONSTANT), 1) == "SIGSEGV"
        if without != self.SHARED:
            self.first.ok("msync", self.at(self.SHARED), PAGE, 4)
            assert self.shared.read_bytes() == b"\1" + b"s" * (FILE - 1)
        assert self.private.read_bytes() == b"p" * FILE
        if without != self.HIDDEN:
            self.first.ok("mprotect", self.at(self.HIDDEN), 16 * PAGE, READ)
            for place in range(16):
                assert self.second.do("load", self.at(self.HIDDEN + place)) == "9", place
        assert self.daemon.sharers("r") == 2

    def leave(self) -> None:
        """Everybody goes; nothing stays."""
        daemon = self.daemon
        self.first.ok("unlink", "r")
        self.second.ok("unlink", "r")
        assert not (daemon.mount / "r").exists()
        eventually(lambda: daemon.shm_objects() == [], "the memory is free")
        assert daemon.metric("sharers") == 0
        self.left = True


@pytest.fixture(name="stage")
def stage_fixture(daemon: Daemon, client_program: Path, directory: Path) -> Iterator[Stage]:
    with clients(client_program, daemon) as start:
        made = Stage(daemon, start(), start(), directory, start)
        made.set_up()
        daemon.expected += [STALE]
        yield made


# -- one daemon for many steps --


class Series:
    """A daemon and two clients for many steps, one after the other: each begins with new memory.

    What a step leaves behind when it fails is thrown away with them.
    """

    def __init__(self, program: Path, *, cramped: bool) -> None:
        """`cramped`: the run directory is on a small file system."""
        self._program = program
        self._cramped = cramped
        self._stack = contextlib.ExitStack()
        self._stage: Stage | None = None
        self.disk = Path()

    def step(self) -> Stage:
        """The stage, set up."""
        if self._stage is None or not self._stage.left:
            self.close()
            self._stage = self._begin()
        self._stage.set_up()
        return self._stage

    def _begin(self) -> Stage:
        enter = self._stack.enter_context
        directory = enter(temporary())
        daemon = Daemon(directory, f"--alignment={ALIGNMENT}")
        daemon.expected += [STALE, LACKS, "cannot be used", "No space left", "make room"]
        daemon.expected += ["cannot be written", "cannot write"]
        may_stop(daemon)
        if self._cramped:
            self.disk = enter(small_file_system(directory / "disk", "4m"))
            daemon.run = self.disk / "run"
        enter(taken_down([daemon]))
        with watched([daemon]):
            daemon.start()
        start = enter(clients(self._program, daemon))
        return Stage(daemon, start(), start(), directory, start)

    def close(self) -> None:
        """Everything goes."""
        stage, self._stage = self._stage, None
        failed = stage is not None and not stage.left
        with contextlib.suppress(BaseException) if failed else contextlib.nullcontext():
            self._stack.close()
        self._stack = contextlib.ExitStack()


@contextlib.contextmanager
def small_file_system(place: Path, size: str) -> Iterator[Path]:
    place.mkdir()
    syscalls.mount("small", str(place), "tmpfs", 0, f"size={size},mode=755")
    try:
        yield place
    finally:
        syscalls.umount(str(place), syscalls.MNT_DETACH)


def series_for(program: Path, *, cramped: bool) -> Iterator[Series]:
    """For a module."""
    made = Series(program, cramped=cramped)
    yield made
    made.close()


@pytest.fixture(scope="module", name="series")
def series_fixture(client_program: Path) -> Iterator[Series]:
    yield from series_for(client_program, cramped=False)


@pytest.fixture(name="step")
def step_fixture(series: Series) -> Iterator[Stage]:
    made = series.step()
    with watched([made.daemon]):
        yield made


def kill_and_arm(daemon: Daemon, barrier: str) -> None:
    """The next daemon is one that will stop there: who calls meets it by waiting for it."""
    daemon.kill()
    arm(daemon, barrier)
    daemon.launch()


def reached_and_killed(daemon: Daemon) -> None:
    """Kill it there."""
    reached(daemon)
    daemon.kill()


def again_until_reached(
    daemon: Daemon, client: Client, command: tuple[object, ...], result: str
) -> str | None:
    """Give a command until it leads there; its answer, if it has one by then.

    A page that a reader without a userfaultfd has put where none belongs is mapped over the
    poison, and then there is nothing to clear.  No other comes as long as there may be: what is
    put to clear poison can be read in that moment (docs/security.md).
    """
    answer, since = None, time.monotonic()

    def there() -> bool:
        nonlocal answer, since
        if any(map(stopped, daemon.processes())):
            return True
        if answer is None and client.has_result():
            answer, since = client.result(), time.monotonic()
            assert answer == result
        elif answer is not None and time.monotonic() - since > 0.5:
            answer = None
            client.send(*command)
        return False

    eventually(there, "the barrier")
    return answer


def told_of(daemon: Daemon) -> dict[str, list[str]]:
    """What the texts of the region say, but for what a daemon has done for it."""
    return {
        name: [
            line
            for line in daemon.info("r", name).splitlines()
            if not line.startswith(("faults:", "populated:"))
        ]
        for name in ("info", "maps", "sharers")
    }


def test_everything_is_adopted(stage: Stage) -> None:
    daemon = stage.daemon
    before = told_of(daemon)
    status = os.stat(daemon.mount / "r")
    daemon.kill()
    # Whose daemon is dead works on.
    assert stage.second.do("scan", stage.at(Stage.MEMORY), 16 * PAGE) == "7"
    stage.first.ok("store", stage.at(Stage.MEMORY), 8)
    assert stage.second.do("load", stage.at(Stage.MEMORY)) == "8"
    stage.first.ok("store", stage.at(Stage.MEMORY), 7)
    daemon.start()
    assert told_of(daemon) == before
    after = os.stat(daemon.mount / "r")
    assert (after.st_ino, after.st_mode, after.st_mtime_ns, after.st_blocks) == (
        status.st_ino,
        status.st_mode,
        status.st_mtime_ns,
        status.st_blocks,
    )
    third = stage.start()
    third.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    assert third.do("load", stage.at(Stage.MEMORY)) == "7"
    third.ok("detach", "r")
    stage.check()
    stage.leave()


def test_a_daemon_that_is_told_to_leaves_everything_to_the_next(stage: Stage) -> None:
    daemon = stage.daemon
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGHUP)
    assert daemon.process.wait(20) == 0
    daemon.process = None
    assert "left everything" in daemon.log()
    daemon.start()
    stage.check()
    stage.leave()


# -- the death matrix --

Scene = Callable[[Stage], tuple[Client, tuple[object, ...], str, int]]
"""What is done while the daemon dies: who, the command, its result, what it changes."""

MATRIX: dict[str, Scene] = {
    "fault.read": lambda s: (s.first, ("check", s.at(s.SHARED + 40), PAGE, ord("s")), "0", -1),
    "fault.dirty": lambda s: (s.second, ("store", s.at(s.SHARED + 5), ord("s")), "0", -1),
    "fill.read": lambda s: (s.second, ("check", s.at(s.PRIVATE + 40), PAGE, ord("p")), "0", -1),
    "writeback.read": lambda s: (s.first, ("msync", s.at(s.SHARED), PAGE, 4), "0", -1),
    "writeback.written": lambda s: (s.first, ("msync", s.at(s.SHARED), PAGE, 4), "0", -1),
    "reply.MSYNC": lambda s: (s.first, ("msync", s.at(s.SHARED), PAGE, 4), "0", -1),
    "mmap": lambda s: (
        s.first,
        ("mmap", s.at(s.MEMORY), 16 * PAGE, 3, SHARED | FIXED),
        "0",
        s.MEMORY,
    ),
    "reply.MMAP": lambda s: (
        s.second,
        ("mmap", s.at(s.HOLE + 32), 16 * PAGE, 3, SHARED | NOREPLACE),
        "0",
        -1,
    ),
    "munmap": lambda s: (s.first, ("munmap", s.at(s.MEMORY), 16 * PAGE), "0", s.MEMORY),
    "reply.MUNMAP": lambda s: (s.first, ("munmap", s.at(s.SHARED), FILE), "0", s.SHARED),
    "mprotect": lambda s: (s.first, ("mprotect", s.at(s.MEMORY), 16 * PAGE, 0), "0", s.MEMORY),
    "backing.stashed": lambda s: (
        s.first,
        ("mprotect", s.at(s.MEMORY), 16 * PAGE, 0),
        "0",
        s.MEMORY,
    ),
    "reply.MPROTECT": lambda s: (
        s.second,
        ("mprotect", s.at(s.HIDDEN), 16 * PAGE, 3),
        "0",
        s.HIDDEN,
    ),
    "reply.DISCARD": lambda s: (
        s.first,
        ("madvise", s.at(s.PRIVATE), FILE, mmap.MADV_DONTNEED),
        "0",
        s.PRIVATE,
    ),
    "violation.stashed": lambda s: (s.first, ("to_memory", s.at(s.CONSTANT), 1), "-14", -1),
    "violation.poisoned": lambda s: (s.first, ("to_memory", s.at(s.CONSTANT), 1), "-14", -1),
    "poison.cleared": lambda s: (s.second, ("from_memory", s.at(s.HIDDEN), 1), "-14", -1),
}


@pytest.mark.parametrize("barrier", MATRIX)
def test_the_daemon_dies_at(step: Stage, barrier: str) -> None:
    dies_at(step, barrier, MATRIX[barrier])


def dies_at(
    stage: Stage,
    barrier: str,
    scene: Scene,
    end: Callable[[Daemon], None] = reached_and_killed,
    arm: Callable[[Daemon, str], None] = kill_and_arm,
    may_refuse: str = "",
) -> None:
    """It dies there, and everything is right with the next one.

    `arm` has it stop at a barrier; `end` ends it when it is there, and may start the next one.
    `may_refuse`: an answer that the call may have as well, and then nothing changes.
    """
    daemon = stage.daemon
    arm(daemon, barrier)
    client, command, result, changed = scene(stage)
    # It meets the daemon that will die, perhaps by waiting for it.
    client.send(*command)
    answer = None
    if barrier in ("poison.cleared", "stash.copied"):
        answer = again_until_reached(daemon, client, command, result)
    end(daemon)
    other = stage.first if client is stage.second else stage.second
    if changed != Stage.MEMORY:
        assert other.do("scan", stage.at(Stage.MEMORY), 16 * PAGE) == "7"
    if daemon.process is None:
        daemon.start()
    answer = answer or client.result()
    if may_refuse and answer == may_refuse:
        stage.check()
        stage.leave()
        return
    assert answer == result
    if barrier.startswith("violation"):
        # Its page is SIGBUS for two milliseconds more.
        eventually(lambda: client.do("load", stage.at(Stage.CONSTANT)) == "11", "the page")
    if barrier in ("mprotect", "backing.stashed"):
        assert other.do("load", stage.at(Stage.MEMORY)) == "SIGSEGV"
        client.ok("mprotect", stage.at(Stage.MEMORY), 16 * PAGE, 3)
        changed = -1  # and it is all there again
    if barrier == "mmap":
        assert other.do("check", stage.at(Stage.MEMORY), 16 * PAGE, 0) == "0"
    if barrier == "munmap":
        assert other.do("load", stage.at(Stage.MEMORY)) == "SIGBUS"
    if barrier == "reply.MUNMAP":
        assert stage.shared.read_bytes() == b"\1" + b"s" * (FILE - 1)
        assert other.do("load", stage.at(Stage.SHARED)) == "SIGBUS"
    if barrier == "reply.MPROTECT":
        assert other.do("scan", stage.at(Stage.HIDDEN), 16 * PAGE) == "9"
    if barrier == "reply.DISCARD":
        assert other.do("check", stage.at(Stage.PRIVATE), FILE, ord("p")) == "0"
    stage.check(without=changed)
    stage.leave()


MALLORY = 65531
"""Nobody's number; /etc/passwd need not have it."""


def touch_everything(daemon: Daemon) -> Callable[[], None]:
    """A reader of another user has been there, and goes on touching what it was given.

    It is no sharer any more: what it has is the descriptor.  Returns how it is ended.
    """
    os.chmod(daemon.mount / "r", 0o604)
    begun, ready = os.pipe()

    def touch() -> None:
        one = Bare(daemon.mount)
        proof = os.open(daemon.mount / "r", os.O_RDONLY)
        asked = one.call(Op.USERFAULTFD, proof)
        own = syscalls.userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK | uffd.USER_MODE_ONLY)
        assert asked.error == 0
        answer = one.call(Op.ATTACH, proof, own, oflags=os.O_RDONLY, flags=RequestFlag.AS_IT_LIES)
        assert answer.error == 0, answer
        os.close(own)
        one.sock.close()
        size = 352 * PAGE
        at = syscalls.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, answer.fd, 0)
        told = False
        while True:
            for page in range(Stage.SHARED * PAGE, size, PAGE):
                syscalls.madvise(at + page, PAGE, syscalls.MADV_POPULATE_READ)
            if not told:
                told = os.write(ready, b"x") > 0
            time.sleep(0.002)

    child = in_child(touch, uid=MALLORY)
    assert os.read(begun, 1)

    def end() -> None:
        assert child.poll() is None
        child.kill()
        os.close(begun)
        os.close(ready)

    return end


MORE: dict[str, Scene] = {
    "watch.copied": lambda s: (s.first, ("store", s.at(s.PRIVATE + 50), ord("p")), "0", -1),
    "watch.put": lambda s: (s.second, ("store", s.at(s.PRIVATE + 50), ord("p")), "0", -1),
    "stash.copied": lambda s: (
        s.second,
        ("to_memory", s.at(s.CONSTANT), 1),
        "-14",
        -1,
    ),
}


@pytest.mark.parametrize("barrier", [*MATRIX, *MORE])
def test_the_daemon_dies_while_a_reader_touches_everything(step: Stage, barrier: str) -> None:
    step.daemon.expected.append("where none belong")
    end = touch_everything(step.daemon)
    try:
        dies_at(step, barrier, {**MATRIX, **MORE}[barrier])
        assert step.daemon.metric("intruded_pages_total") > 0
    finally:
        end()


def test_a_protection_that_outlives_its_object_is_no_obstacle(stage: Stage) -> None:
    """Markers of it stay where pages were mapped, and there is no object any more."""
    daemon, at = stage.daemon, stage.at(Stage.CONSTANT)
    daemon.kill()
    launch_parked(daemon, "munmap")
    stage.first.send("munmap", at, 16 * PAGE)
    parked(daemon)
    daemon.start()
    assert stage.first.result() == "0"
    for client in (stage.first, stage.second):
        assert client.do("load", at) == "SIGBUS"
        assert client.do("store", at + PAGE, 1) == "SIGBUS"
        assert client.do("from_memory", at + 2 * PAGE, 1) == "-14"
    stage.second.ok("mmap", at, 16 * PAGE, READ | WRITE, SHARED | FIXED)
    for client in (stage.first, stage.second):
        client.ok("fill", at, 16 * PAGE, 11)
    stage.second.ok("mprotect", at, 16 * PAGE, READ)
    stage.check()
    stage.leave()


def test_a_page_that_nobody_may_touch_is_not_taken_for_read(stage: Stage) -> None:
    """One beyond the end of its file, that a system call has met before it was hidden."""
    daemon, start = stage.daemon, stage.at(Stage.PRIVATE)
    end = start + FILE
    stage.first.ok("mmap", start, FILE + PAGE, READ, PRIVATE | FIXED, stage.private, os.O_RDONLY, 0)
    assert stage.second.do("from_memory", end, 1) == "-14"
    daemon.kill()
    launch_parked(daemon, "poison.cleared")
    stage.first.send("mprotect", start, FILE + PAGE, 0)
    parked(daemon)
    daemon.start()
    assert stage.first.result() == "0"
    with stage.private.open("ab") as file:
        file.write(b"x" * PAGE)
    for client in (stage.first, stage.second):
        assert client.do("load", end) == "SIGSEGV"
    stage.first.ok("mprotect", start, FILE + PAGE, READ)
    for client in (stage.first, stage.second):
        client.ok("check", start, FILE, ord("p"))
        client.ok("check", end, PAGE, ord("x"))


def test_the_daemon_dies_between_stash_and_backing(stage: Stage) -> None:
    """What was PROT_NONE is in both; the backing's page may be written to meanwhile."""
    daemon, first, second = stage.daemon, stage.first, stage.second
    first.ok("mprotect", stage.at(Stage.HIDDEN), 16 * PAGE, 3)
    daemon.kill()
    launch_parked(daemon, "stash.copied")
    second.send("store", stage.at(Stage.HIDDEN), 10)
    parked(daemon)
    assert second.result() == "0"
    daemon.start()
    assert first.do("load", stage.at(Stage.HIDDEN)) == "10"
    second.ok("store", stage.at(Stage.HIDDEN), 9)
    assert first.do("scan", stage.at(Stage.HIDDEN), 16 * PAGE) == "9"
    stage.check(without=Stage.HIDDEN)
    stage.leave()


@pytest.mark.parametrize("barrier", ["recovery.regions", "recovery.sharers", "recovery.protected"])
def test_the_daemon_dies_while_it_adopts(stage: Stage, barrier: str) -> None:
    daemon = stage.daemon
    stage.second.ok("store", stage.at(Stage.SHARED), 1)
    daemon.kill()
    stage.first.send("load", stage.at(Stage.SHARED + 41))
    for _ in range(2):
        launch_parked(daemon, barrier)
        parked(daemon)
    daemon.start()
    assert stage.first.result() == str(ord("s"))
    stage.check()
    stage.leave()


def test_the_daemon_dies_in_a_collapse(
    make_daemon: Callable[..., Daemon], client_program: Path, directory: Path
) -> None:
    daemon = make_daemon(f"--alignment={ALIGNMENT}", often(directory)).start()
    daemon.expected += [STALE]
    with clients(client_program, daemon) as start:
        first, second = start(), start()
        first.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        first.ok("mmap", BASE, SIZE, 3, SHARED | FIXED)
        second.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        daemon.kill()
        launch_parked(daemon, "collapse")
        for client in (first, second):
            client.ok("fill", BASE, SIZE, 5)
        parked(daemon)
        daemon.start()
        eventually(lambda: daemon.metric("collapsed_chunks_total") > 0, "a collapse")
        for client in (first, second):
            assert client.do("scan", BASE, SIZE) == "5"


def test_huge_pages_are_adopted(
    make_daemon: Callable[..., Daemon], client_program: Path, directory: Path
) -> None:
    """Those too that nobody has in a page table just now."""
    with huge_pages(8):
        daemon = make_daemon(f"--alignment={ALIGNMENT}", "--backing=hugetlb").start()
        daemon.expected += [STALE]
        with clients(client_program, daemon) as start:
            first = start()
            first.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
            first.ok("mmap", BASE, SIZE, 3, SHARED | FIXED)
            first.ok("fill", BASE, SIZE - ALIGNMENT, 5)
            first.ok("mprotect", BASE, ALIGNMENT, 0)
            first.kill()
            daemon.kill()
            daemon.start()
            second = start()
            second.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
            daemon.kill()
            second.send("load", BASE + SIZE - ALIGNMENT)
            daemon.start()
            assert second.result() == "0"
            assert second.do("scan", BASE + ALIGNMENT, SIZE - 2 * ALIGNMENT) == "5"
            assert second.do("load", BASE) == "SIGSEGV"
            second.ok("mprotect", BASE, ALIGNMENT, READ)
            assert second.do("scan", BASE, ALIGNMENT) == "5"
            second.ok("unlink", "r")


# -- making and removing regions --


@pytest.mark.parametrize("barrier", ["create", "reply.ATTACH", "reply.USERFAULTFD", "reply.READY"])
@pytest.mark.parametrize("user", [0, 65534])
def test_who_creates_a_region_gets_it(stage: Stage, barrier: str, user: int) -> None:
    """Alone: O_EXCL holds although its open() is made twice."""
    if barrier == "reply.USERFAULTFD" and user == 0:
        barrier = "reply.ATTACH"
    daemon = stage.daemon
    creator, late = (stage.start(user=user, group=user, extra_groups=[]) for _ in range(2))
    daemon.kill()
    launch_parked(daemon, "reply.ATTACH" if barrier == "reply.READY" else barrier)
    creator.send("mshare", "new", BASE + SIZE, SIZE, CREATE, 0o600)
    parked(daemon)
    daemon.start()
    assert creator.result() == "0"
    assert late.do("mshare", "new", BASE + SIZE, SIZE, CREATE, 0o600) == "-17"
    late.ok("mshare", "new", BASE + SIZE, SIZE, os.O_RDWR, 0)
    creator.ok("mmap", BASE + SIZE, PAGE, 3, SHARED | FIXED)
    creator.ok("store", BASE + SIZE, 3)
    assert late.do("load", BASE + SIZE) == "3"
    assert daemon.sharers("new") == 2
    late.ok("unlink", "new")
    creator.ok("unlink", "new")
    assert not (daemon.mount / "new").exists()
    stage.check()
    stage.leave()


@pytest.mark.parametrize("at", [BASE + SIZE, 0])
@pytest.mark.parametrize("exclusive", [os.O_EXCL, 0])
def test_what_goes_while_it_is_made_is_made_anew(stage: Stage, at: int, exclusive: int) -> None:
    """As a name that the next daemon takes back.  Nobody who creates hears ENOENT (open(2))."""
    daemon, creator = stage.daemon, stage.start()
    pager, path = daemon.pager(), daemon.mount / "new"
    os.kill(pager, signal.SIGSTOP)
    try:
        creator.send("mshare", "new", at, SIZE, os.O_CREAT | os.O_RDWR | exclusive, 0o600)
        eventually(path.exists, "the name")
        path.unlink()
    finally:
        os.kill(pager, signal.SIGCONT)
    assert creator.result() == "0"
    start, _ = struct.unpack("=QQ", path.read_bytes())
    creator.ok("mmap", start, PAGE, 3, SHARED | FIXED)
    creator.ok("store", start, 3)
    creator.ok("unlink", "new")
    assert not path.exists()
    stage.check()
    stage.leave()


@pytest.mark.parametrize("barrier", ["create", "established", "reply.ATTACH"])
@pytest.mark.parametrize("exclusive", [os.O_EXCL, 0])
def test_a_region_that_is_put_somewhere_is_made_once(
    stage: Stage, barrier: str, exclusive: int
) -> None:
    daemon = stage.daemon
    creator, late = stage.start(), stage.start()
    daemon.kill()
    launch_parked(daemon, barrier)
    creator.send("mshare", "new", 0, 3 * PAGE, os.O_CREAT | os.O_RDWR | exclusive, 0o600)
    parked(daemon)
    daemon.start()
    assert creator.result() == "0"
    start, size = struct.unpack("=QQ", (daemon.mount / "new").read_bytes())
    assert size == ALIGNMENT
    creator.ok("store", start + 3 * PAGE - 1, 3)
    late.ok("mshare", "new", 0, 1, os.O_RDWR, 0)
    assert late.do("load", start + 3 * PAGE - 1) == "3"
    assert late.do("load", start + 3 * PAGE) == "SIGBUS"
    assert daemon.sharers("new") == 2
    late.ok("unlink", "new")
    creator.ok("unlink", "new")
    assert not (daemon.mount / "new").exists()
    stage.check()
    stage.leave()


@pytest.mark.parametrize(
    "barrier", ["reply.ATTACH", "reply.VMA_FILE", "reply.MMAP", "reply.COMMIT", "reply.READY"]
)
@pytest.mark.parametrize("access", [os.O_RDWR, os.O_RDONLY])
def test_a_donor_goes_on(stage: Stage, barrier: str, access: int) -> None:
    daemon = stage.daemon
    donor, sharer = stage.start(), stage.start()
    path = stage.directory / "donated"
    path.write_bytes(b"d" * PAGE)
    at = BASE + SIZE
    donor.ok("map", at, ALIGNMENT, SHARED)
    donor.ok("fill", at, ALIGNMENT, 6)
    donor.ok("mapfile", at + SIZE - PAGE, PAGE, path)
    donor.ok("store", at + SIZE - PAGE, 4)
    daemon.kill()
    launch_parked(daemon, barrier)
    donor.send("mshare", "given", at, SIZE, os.O_CREAT | os.O_EXCL | access, 0o600)
    parked(daemon)
    daemon.start()
    assert donor.result() == "0"
    sharer.ok("mshare", "given", at, SIZE, os.O_RDONLY, 0)
    for client in (donor, sharer):
        assert client.do("scan", at, ALIGNMENT) == "6"
        assert client.do("load", at + SIZE - PAGE) == "4"
        assert client.do("load", at + ALIGNMENT) == "SIGBUS"
    for client in (sharer, donor):
        client.ok("unlink", "given")
    assert not (daemon.mount / "given").exists()
    stage.check()
    stage.leave()


def test_a_donor_that_dies_with_the_daemon_leaves_no_name(stage: Stage) -> None:
    daemon, donor = stage.daemon, stage.start()
    donor.ok("map", BASE + SIZE, SIZE, SHARED)
    donor.ok("fill", BASE + SIZE, SIZE, 6)
    daemon.kill()
    launch_parked(daemon, "reply.VMA_FILE")
    donor.send("mshare", "given", BASE + SIZE, SIZE, CREATE, 0o600)
    parked(daemon)
    donor.kill()
    daemon.start()
    assert "its donor is gone" in daemon.log()
    eventually(lambda: not (daemon.mount / "given").exists(), "the name is gone")
    stage.check()
    stage.leave()


def test_a_donor_that_gives_up_leaves_no_name(stage: Stage, client_program: Path) -> None:
    daemon = stage.daemon
    with clients(client_program, daemon, MSHARE_RECONNECT_SECONDS="0") as start:
        donor = start()
        donor.ok("map", BASE + SIZE, SIZE, SHARED)
        donor.ok("fill", BASE + SIZE, SIZE, 6)
        daemon.kill()
        launch_parked(daemon, "reply.VMA_FILE")
        eventually(lambda: daemon.log().count("ready:") == 2, "the daemon")
        donor.send("mshare", "given", BASE + SIZE, SIZE, CREATE, 0o600)
        parked(daemon)
        assert donor.result() == "-107"
        assert donor.do("scan", BASE + SIZE, SIZE) == "6", "it has what it had"
        daemon.start()
        assert "its donor is gone" in daemon.log()
        eventually(lambda: not (daemon.mount / "given").exists(), "the name is gone")
        donor.ok("mshare", "given", BASE + SIZE, SIZE, CREATE, 0o600)
        donor.ok("unlink", "given")
    stage.check()
    stage.leave()


@pytest.mark.parametrize("barrier", ["reply.UNLINK", "reply.DETACH", "unlink"])
def test_a_region_is_removed_once(stage: Stage, barrier: str) -> None:
    daemon, owner, other = stage.daemon, stage.start(), stage.start()
    owner.ok("mshare", "new", BASE + SIZE, SIZE, CREATE, 0o600)
    if barrier == "unlink":
        owner.ok("detach", "new")
    daemon.kill()
    launch_parked(daemon, barrier)
    owner.send("detach" if barrier == "reply.DETACH" else "unlink", "new")
    parked(daemon)
    daemon.start()
    assert owner.result() == "0"
    assert (daemon.mount / "new").exists() == (barrier == "reply.DETACH")
    other.do("mshare", "new", BASE + SIZE, SIZE, os.O_CREAT | os.O_RDWR, 0o600)
    other.ok("unlink", "new")
    stage.check()
    stage.leave()


def test_a_child_waits_for_the_next_daemon(stage: Stage) -> None:
    stage.daemon.kill()
    stage.first.send("fork", "load", stage.at(Stage.MEMORY))
    time.sleep(0.2)
    stage.daemon.start()
    assert stage.first.result() == "7"
    stage.daemon.kill()
    launch_parked(stage.daemon, "reply.ATTACH")
    stage.first.send("fork", "load", stage.at(Stage.MEMORY))
    parked(stage.daemon)
    stage.daemon.start()
    assert stage.first.result() == "7"
    eventually(lambda: stage.daemon.sharers("r") == 2, "the child has gone")
    stage.check()
    stage.leave()


# -- sharers that change while no daemon is there --


def test_who_ends_while_no_daemon_is_there_is_no_sharer(stage: Stage) -> None:
    daemon = stage.daemon
    gone, execs = stage.start(), stage.start()
    for client in (gone, execs):
        client.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    daemon.kill()
    gone.kill()
    execs.send("exec")
    execs.ok("hello")
    daemon.start()
    stage.check()
    execs.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    assert daemon.sharers("r") == 3
    daemon.kill()
    daemon.start()
    execs.ok("exec" if False else "hello")
    execs.send("exec")
    execs.ok("hello")
    eventually(lambda: daemon.sharers("r") == 2, "an orphan's exec is noticed")
    stage.check(without=Stage.HIDDEN)
    stage.leave()


def test_what_a_sharer_wrote_before_it_ended_comes_to_the_file(stage: Stage) -> None:
    """Nobody is left whose page table would tell that the page is dirty."""
    daemon = stage.daemon
    stage.second.ok("store", stage.at(Stage.SHARED) + PAGE, 2)
    daemon.kill()
    stage.first.kill()
    stage.second.kill()
    daemon.start()
    eventually(
        lambda: (
            stage.shared.read_bytes()
            == b"\1" + b"s" * (PAGE - 1) + b"\2" + b"s" * (FILE - PAGE - 1)
        ),
        "written back",
    )
    eventually(lambda: daemon.metric("written_back_bytes_total") > 0, "and written down")
    # What is clean is left alone: somebody else may have written to the file.
    with stage.shared.open("r+b") as file:
        file.write(b"other")
    daemon.kill()
    daemon.start()
    (daemon.mount / "r").unlink()
    eventually(lambda: daemon.shm_objects() == [], "the memory is free")
    assert stage.shared.read_bytes()[:5] == b"other"


def test_a_hole_that_was_touched_can_be_mapped(stage: Stage) -> None:
    """The poison there is forgotten by nobody."""
    for client in (stage.first, stage.second):
        assert client.do("load", stage.at(Stage.HOLE)) == "SIGBUS"
    stage.daemon.kill()
    stage.daemon.start()
    stage.first.ok("mmap", stage.at(Stage.HOLE), PAGE, 3, SHARED | NOREPLACE)
    stage.first.ok("store", stage.at(Stage.HOLE), 4)
    assert stage.second.do("load", stage.at(Stage.HOLE)) == "4"


def test_readers_are_adopted(stage: Stage) -> None:
    reader = stage.start()
    reader.ok("mshare", "r", BASE, SIZE, os.O_RDONLY, 0)
    stage.daemon.kill()
    reader.send("check", stage.at(Stage.PRIVATE + 40), PAGE, ord("p"))
    stage.daemon.start()
    assert reader.result() == "0"
    assert reader.do("mmap", stage.at(Stage.HOLE), PAGE, 3, SHARED | FIXED) == "-13"
    reader.ok("detach", "r")
    stage.check()
    stage.leave()


def test_a_call_does_not_wait_for_ever(stage: Stage, client_program: Path) -> None:
    with clients(client_program, stage.daemon, MSHARE_RECONNECT_SECONDS="0.3") as start:
        client = start()
        client.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        stage.daemon.kill()
        assert client.do("munmap", BASE, PAGE) == "-107"
        assert client.do("stat", "r") == "-107"
        assert client.do("load", BASE) == "7"
        stage.daemon.start()
        client.ok("detach", "r")
    stage.check()
    stage.leave()


# -- what survives the daemon, and what does not --


def keeper_of(daemon: Daemon) -> int:
    """The process that keeps the descriptors."""
    socket = str(daemon.run / "users" / str(os.getuid()) / "keeper")
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            words = Path(f"/proc/{int(name)}/cmdline").read_bytes().split(b"\0")
            if any(word.endswith(b"msharefsd/life/keeper.py") for word in words):
                found.append(int(name))
    inodes = {
        line.split()[6]
        for line in Path("/proc/net/unix").read_text().splitlines()
        if line.endswith(socket)
    }
    for pid in found:
        if any(f"socket:[{inode}]" in descriptors_of(pid) for inode in inodes):
            return pid
    return 0


def descriptors_of(pid: int) -> set[str]:
    """What the descriptors of a process are; it may end, and close some, meanwhile."""
    links = set()
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                links.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return links


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except OSError:
        return False


def test_a_keeper_that_dies_is_replaced(stage: Stage) -> None:
    daemon = stage.daemon
    daemon.expected += ["keeps descriptors has died"]
    keeper = keeper_of(daemon)
    assert keeper
    os.kill(keeper, signal.SIGKILL)
    found = [keeper]

    def another() -> bool:
        found.append(keeper_of(daemon))
        return found[-1] not in (0, keeper)

    eventually(another, "another keeper")
    keeper = found[-1]
    files = {str(stage.shared), str(stage.private)}
    eventually(lambda: files <= descriptors_of(keeper), "it has what the old one had")
    daemon.kill()
    daemon.start()
    assert keeper_of(daemon) == keeper
    stage.check()
    stage.leave()
    eventually(
        lambda: not files & descriptors_of(keeper), "it lets go of what is not mapped any more"
    )
    daemon.stop()
    # A zombie, until whoever is its parent now looks.
    eventually(lambda: not running(keeper), "the keeper ends with its daemon")


def test_a_file_that_is_lost_is_sigbus(stage: Stage) -> None:
    """Daemon and keeper both died: what is in memory stays."""
    daemon = stage.daemon
    keeper = keeper_of(daemon)
    daemon.kill()
    os.kill(keeper, signal.SIGKILL)
    daemon.expected += ["descriptor of .* was lost", "cannot write back", "did not take"]
    daemon.start()
    for offset in (Stage.SHARED, Stage.PRIVATE):
        assert stage.second.do("load", stage.at(offset)) == "1"
    assert stage.first.do("msync", stage.at(Stage.SHARED), PAGE, 4) == "-5"
    stage.first.ok(
        "mmap", stage.at(Stage.SHARED), PAGE, 3, SHARED | FIXED, stage.shared, os.O_RDWR, 0
    )
    assert stage.second.do("load", stage.at(Stage.SHARED)) == str(ord("s"))


def test_memory_that_is_lost_is_told(stage: Stage) -> None:
    daemon = stage.daemon
    daemon.kill()
    for client in (stage.first, stage.second):  # who has it could give it
        client.kill()
    for name in daemon.shm_objects():
        os.unlink(f"/dev/shm/{name}")
    daemon.expected += ["region r: its memory .* is gone"]
    daemon.start()
    assert daemon.field("r", "state") == "no range"
    third = stage.start()
    third.ok("mshare", "r", BASE, SIZE, os.O_CREAT | os.O_RDWR, 0o600)


def refused(daemon: Daemon, complaint: str) -> None:
    daemon.launch()
    assert daemon.process is not None
    assert daemon.process.wait(20) == 3
    daemon.process = None
    daemon.expected.append(complaint)
    assert complaint in daemon.log()


@pytest.mark.parametrize("journal", ["names.sqlite", "users/0/journal.sqlite"])
def test_a_journal_that_is_not_understood_is_not_thrown_away(stage: Stage, journal: str) -> None:
    daemon = stage.daemon
    path = daemon.run / journal
    daemon.kill()
    daemon.expected += [STALE]
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    whole = path.read_bytes()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 99")
    refused(daemon, "schema 99")
    path.write_bytes(b"no database" + whole[11:])
    refused(daemon, "cannot be used")
    path.write_bytes(whole)
    path.chmod(0o666)
    refused(daemon, "cannot be trusted")
    path.chmod(0o600)
    daemon.start()
    stage.check()
    stage.leave()


def test_a_state_of_another_boot_is_not_used(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(f"--alignment={ALIGNMENT}").start()
    (daemon.mount / "old").touch()
    daemon.kill()
    daemon.expected += [STALE, "before the machine was started"]
    with contextlib.closing(sqlite3.connect(daemon.run / "names.sqlite")) as database:
        database.execute("UPDATE boot SET id = 'x'")
        database.commit()
    daemon.start()
    assert not (daemon.mount / "old").exists()


def test_an_inode_number_is_one_regions_for_good(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(f"--alignment={ALIGNMENT}").start()
    daemon.expected += [STALE]
    seen = set()
    for name in ("a", "b", "c"):
        (daemon.mount / name).touch(mode=0o640)
        seen.add((daemon.mount / name).stat().st_ino)
        if name != "b":
            (daemon.mount / name).unlink()
        daemon.kill()
        daemon.start()
    assert len(seen) == 3
    os.chown(daemon.mount / "b", 1, 2)
    daemon.kill()
    daemon.start()
    status = (daemon.mount / "b").stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o640, 1, 2)


# -- at random --


@pytest.fixture(scope="module")
def witness_program() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mshare-test-") as name:
        yield compile_c(
            SUPPORT / "witness.c",
            Path(name) / "witness",
            "-O2",
            "-D_GNU_SOURCE",
            "-Wall",
            "-Wextra",
        )


WITNESSES = 4
PAGES = 512


@pytest.mark.timeout(120 + 10 * KILLS)
def test_killed_at_random_under_load(
    make_daemon: Callable[..., Daemon], witness_program: Path, directory: Path
) -> None:
    daemon = make_daemon(f"--alignment={ALIGNMENT}", often(directory)).start()
    daemon.expected += [STALE]
    dice = random.Random(KILLS)
    running: list[subprocess.Popen[str]] = []
    environment = {**os.environ, "MSHARE_ROOT": str(daemon.mount)}
    with contextlib.ExitStack() as stack:
        for rank in range(WITNESSES):
            path = directory / f"file{rank}"
            path.write_bytes(bytes(16 * PAGE))
            words = [BASE, PAGES, rank, WITNESSES, path, dice.randrange(1 << 30), ALIGNMENT]
            process = stack.enter_context(
                subprocess.Popen(
                    [witness_program, *map(str, words)],
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            )
            stack.callback(process.kill)
            running.append(process)
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for number in itertools.count():
            time.sleep(dice.random() * 0.3)
            for process in running:
                if process.poll() is not None:
                    assert process.stdout is not None
                    pytest.fail(f"after {number} kills: {process.stdout.read()}")
            if number == KILLS:
                break
            daemon.kill()
            time.sleep(dice.random() * 0.1)
            daemon.start()
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            said = process.communicate()[0]
            print(said, end="")
            assert said.startswith("ok"), said
            assert process.returncode == 0
    eventually(lambda: daemon.metric("sharers") == 0, "everybody has gone")
    names = [name for name in os.listdir(daemon.mount) if not name.startswith(".")]
    assert sorted(names) == ["mshare_info", "witnessed"]
    (daemon.mount / "witnessed").unlink()
    eventually(lambda: daemon.shm_objects() == [], "the memory is free")
    with contextlib.closing(sqlite3.connect(f"file:{daemon.run}/names.sqlite?mode=ro", uri=True)):
        pass
    assert mounts.top_mount(str(daemon.mount)) is not None
    assert sum(1 for each in mounts.mounts() if each.target == str(daemon.mount)) == 1
