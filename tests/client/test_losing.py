"""A window without its guard cannot exist: whatever a sharer does to descriptors by accident.

Every way to lose them, and what is read then by the process itself, by another sharer and
by a child: of a file, of a hole, of what is PROT_NONE, of anonymous memory, that nobody
has touched before.  With a daemon, without one, and with the next one.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import select
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ALIGNMENT, BASE, PAGE, Client, Daemon, clients, eventually

pytestmark = pytest.mark.shm_only
SIZE = 2 * ALIGNMENT
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
FIXED = 0x10
SHARED, PRIVATE = mmap.MAP_SHARED | FIXED, mmap.MAP_PRIVATE | FIXED
READ, WRITE = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
WAYS = [
    "nothing",
    "close",
    "close_range",
    "close_range_unshare",
    "dup2_file",
    "dup2_socket",
    "dup2_userfaultfd",
    "socket",
    "userfaultfd",
    "memory",
    "unshare",
    "thread_apart",
    "clone_files",
    "clone_vm",
    "clone_vm_files",
    "vfork",
    "spawn",
    "leak",
    "daemon",
    "dofork",
    "dofork_closed",
]
"""What losing.h knows."""
OTHERS_WAYS = [
    way for way in WAYS if way not in ("daemon", "dup2_userfaultfd", "dofork", "dofork_closed")
]
"""Of a process of another user: two take rights, and windows are not inherited registered."""
ALICE = 65531
WATCHERS = ["loser", "other", "child", "clone"]
"""Who looks: `clone` is a child of which the library knows nothing."""
STRIDE = 32 * PAGE
"""From one watcher's pages to the next one's: nobody populates another's."""
FILE, ANONYMOUS, PROT_NONE, HOLE, WRITTEN = (number * 4 * STRIDE for number in range(5))
"""Where each kind of memory begins in the region."""
FILE_BYTE, HIDDEN_BYTE = 97, 98


@dataclass
class Place:
    """A region, who loses descriptors there, and who does not."""

    way: str
    start: int
    loser: Client
    other: Client
    file: Path
    mount: Path
    others: bool = False
    """It is the other one's region, and who loses is another user."""

    def at(self, kind: int, watcher: str) -> int:
        return self.start + kind + WATCHERS.index(watcher) * STRIDE

    def make(self) -> None:
        """Each kind of memory for each watcher, and nothing of it populated but what is hidden."""
        maker, joiner = (self.other, self.loser) if self.others else (self.loser, self.other)
        do = maker.ok
        do("mshare", self.way, self.start, SIZE, CREATE, 0o600)
        if self.others:
            os.chmod(self.mount / self.way, 0o606)
        for watcher in WATCHERS:
            where = (self.at(FILE, watcher), 16 * PAGE, READ, PRIVATE, self.file, os.O_RDONLY, 0)
            do("mmap", *where)
            do("mmap", self.at(ANONYMOUS, watcher), 16 * PAGE, WRITE, SHARED)
            do("mmap", self.at(PROT_NONE, watcher), PAGE, WRITE, SHARED)
            do("store", self.at(PROT_NONE, watcher), HIDDEN_BYTE)
            do("mprotect", self.at(PROT_NONE, watcher), PAGE, 0)
        written = (self.start + WRITTEN, PAGE, WRITE, SHARED, self.written, os.O_RDWR, 0)
        do("mmap", *written)
        joiner.ok("mshare", self.way, self.start, SIZE, os.O_RDWR, 0)
        assert self.loser.do("load", self.start + WRITTEN) == str(FILE_BYTE)

    @property
    def written(self) -> Path:
        return self.file.with_name(self.way)

    def watchers(self) -> Iterator[tuple[str, Client, list[str]]]:
        yield "loser", self.loser, []
        yield "other", self.other, []
        yield "child", self.loser, ["fork"]
        yield "clone", self.loser, ["clone"]

    def looks(self) -> list[tuple[str, Client, list[object], list[str]]]:
        """What each is told to do, and the answers that are right."""
        found: list[tuple[str, Client, list[object], list[str]]] = []
        for watcher, client, before in self.watchers():
            for name, kind, answer in (
                ("file", FILE, str(FILE_BYTE)),
                ("anonymous", ANONYMOUS, "0"),
                ("PROT_NONE", PROT_NONE, "SIGSEGV"),
                ("hole", HOLE, "SIGBUS"),
            ):
                right = [answer]
                if watcher == "clone" and "dofork" not in self.way:
                    right = ["SIGSEGV"]  # nothing is mapped there
                elif watcher == "clone" and kind == PROT_NONE:
                    right = ["SIGBUS"]  # it is not known which process that is
                if watcher == "child" and self.way == "daemon":
                    right.append("SIGSEGV")  # it may not attach any more
                words = [*before, "load", self.at(kind, watcher)]
                found.append((f"{self.way}: {watcher}: {name}", client, words, right))
        return found


class Matrix:
    """All ways at once, each in a region of its own, under one daemon."""

    def __init__(
        self,
        daemon: Daemon,
        start: Callable[..., Client],
        directory: Path,
        ways: list[str],
        user: int | None = None,
    ) -> None:
        """`user`: of another user than the region's owner are those who lose."""
        self.daemon = daemon
        who = {} if user is None else {"user": user, "group": user, "extra_groups": []}
        file = directory / "file"
        file.write_bytes(bytes([FILE_BYTE]) * 16 * PAGE)
        self.places = []
        for number, way in enumerate(ways):
            at = BASE + number * SIZE
            place = Place(way, at, start(**who), start(), file, daemon.mount, user is not None)
            place.written.write_bytes(bytes([FILE_BYTE]) * PAGE)
            place.make()
            self.places.append(place)
        self.wrong: list[str] = []

    def judge(self, order: list[str]) -> None:
        """These steps, and whether everybody sees what is right then."""
        for step in order:
            match step:
                case "lose":
                    self.lose()
                case "restart":
                    self.restart()
                case "kill":
                    self.daemon.kill()
        self.ask()
        if "kill" in order:
            self.nobody_answers()
            self.again()
        self.answers()
        self.shown()
        self.calls()
        assert not self.wrong, "\n".join(self.wrong)
        self.end()

    def lose(self) -> None:
        for place in self.places:
            place.loser.ok("lose", place.way, place.start, SIZE)

    def restart(self) -> None:
        self.daemon.kill()
        self.again()

    def again(self) -> None:
        if "taking down the mount" not in self.daemon.expected:
            self.daemon.expected.append("taking down the mount")
        self.daemon.start()

    def ask(self) -> None:
        for place in self.places:
            for _, client, words, _ in place.looks():
                client.send(*words)

    def nobody_answers(self) -> None:
        """Who touches a file's page first waits."""
        pipes = {
            client.process.stdout.fileno(): f"{place.way}: {who}"
            for place in self.places
            for who, client in (("loser", place.loser), ("other", place.other))
            if client.process.stdout is not None
        }
        answered, _, _ = select.select(list(pipes), [], [], 0.5)
        self.wrong += [f"{pipes[fd]} did not wait" for fd in answered]

    def answers(self) -> None:
        for place in self.places:
            for what, client, words, right in place.looks():
                print(what)  # the last one is what does not come
                got = client.result()
                if got not in right:
                    self.wrong.append(f"{what}: {words}: {got}, not {right}")

    def shown(self) -> None:
        """What was hidden is there, and writes reach their file, whoever made them."""
        for place in self.places:
            place.loser.ok("store", place.start + WRITTEN, 1)
            place.other.ok("msync", place.start + WRITTEN, PAGE, 4)
            if place.written.read_bytes()[0] != 1:
                self.wrong.append(f"{place.way}: a write is not in its file")
            for watcher, client, before in place.watchers():
                if watcher == "clone" or (watcher == "child" and place.way == "daemon"):
                    continue
                page = place.at(PROT_NONE, watcher)
                place.other.ok("mprotect", page, PAGE, READ)
                if (got := client.do(*before, "load", page)) != str(HIDDEN_BYTE):
                    self.wrong.append(f"{place.way}: {watcher}: what was hidden is {got}")

    def calls(self) -> None:
        """Calls work again, by the region's name; who may not open that any more is told so."""
        for place in self.places:
            got = place.loser.do("mmap", place.start + HOLE, PAGE, WRITE, SHARED)
            right = str(-errno.EACCES) if place.way == "daemon" else "0"
            if got != right:
                self.wrong.append(f"{place.way}: mmap: {got}")
            elif right == "0":
                place.other.ok("store", place.start + HOLE, 5)
                got = place.loser.do("load", place.start + HOLE)
                if place.others and got == "SIGBUS":
                    # In a lane that is late the end of a hole's poison may be late, too.
                    eventually(
                        lambda of=place: of.loser.do("load", of.start + HOLE) == "5",  # type: ignore[misc] # mypy and defaults
                        "what was mapped",
                    )
                elif got != "5":
                    self.wrong.append(f"{place.way}: what it mapped is {got}")

    def end(self) -> None:
        """Of all of them the daemon knows when they end."""
        for place in self.places:
            place.other.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(place.loser.pid, 9)
            place.loser.process.wait()
        for place in self.places:
            eventually(lambda of=place.way: self.daemon.sharers(of) == 0, f"the end of {place.way}")  # type: ignore[misc] # mypy and defaults


@pytest.fixture
def matrix(daemon: Daemon, client_program: Path, directory: Path) -> Iterator[Matrix]:
    with clients(client_program, daemon) as start:
        yield Matrix(daemon, start, directory, WAYS)


ORDERS = [
    ["lose"],
    ["lose", "restart"],
    ["restart", "lose"],
    ["lose", "kill"],
    ["kill", "lose"],
    ["restart", "lose", "restart"],
    ["lose", "restart", "restart", "kill"],
]


@pytest.mark.timeout(100)
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_zeros_are_read_where_zeros_belong(matrix: Matrix, order: list[str]) -> None:
    matrix.judge(order)


@pytest.mark.timeout(100)
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_another_users_process_is_no_exception(
    daemon: Daemon, client_program: Path, directory: Path, order: list[str]
) -> None:
    """Its userfaultfd is in a lane, and on its way in a socket that the keeper has."""
    with clients(client_program, daemon) as start:
        Matrix(daemon, start, directory, OTHERS_WAYS, ALICE).judge(order)


def test_who_has_the_memory_of_one_that_has_ended_is_a_sharer(
    daemon: Daemon, spawn: Callable[..., Client], directory: Path
) -> None:
    """clone(CLONE_VM): the address space lives on when the process that attached has ended."""
    file = directory / "file"
    file.write_bytes(bytes([FILE_BYTE]) * 4 * PAGE)
    twin, other = spawn(), spawn()
    twin.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    twin.ok("mmap", BASE, 2 * STRIDE, READ, PRIVATE, file, os.O_RDONLY, 0)
    other.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    twin.ok("twin")
    twin.process.wait()
    assert other.do("load", BASE + SIZE - PAGE) == "SIGBUS", "the daemon knows by now"
    assert daemon.sharers("r") == 2
    twin.ok("lose", "close_range", 0, 0)
    for number in range(2):
        assert twin.do("load", BASE + number * PAGE) == str(FILE_BYTE)
        assert other.do("load", BASE + number * PAGE) == str(FILE_BYTE)
        assert twin.do("load", BASE + SIZE - (number + 2) * PAGE) == "SIGBUS"
        if number == 0:
            daemon.kill()
            daemon.expected.append("taking down the mount")
            daemon.start()
            other.ok("madvise", BASE, PAGE, mmap.MADV_DONTNEED)  # of a file: it is read anew
    assert daemon.sharers("r") == 2
    with contextlib.suppress(ProcessLookupError):
        os.killpg(twin.pid, 9)
    eventually(lambda: daemon.sharers("r") == 1, "the end of it")


def test_without_the_right_to_it_a_clone_that_undoes_dontfork_makes_zeros(
    make_daemon: Callable[..., Daemon], client_program: Path, directory: Path
) -> None:
    """The one thing that is not to be had, and what can be: fork(3) is safe nevertheless.

    UFFD_FEATURE_EVENT_FORK takes CAP_SYS_PTRACE, which an ordinary user's daemon has not.
    """
    file = directory / "file"
    file.write_bytes(bytes([FILE_BYTE]) * STRIDE * 2)
    daemon = make_daemon(f"--alignment={ALIGNMENT}", "--without=inheritance").start()
    daemon.expected.append("no right to UFFD_FEATURE_EVENT_FORK")
    with clients(client_program, daemon) as start:
        client = start()
        client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        client.ok("mmap", BASE, PAGE, READ, PRIVATE, file, os.O_RDONLY, 0)
        client.ok("mmap", BASE + STRIDE, PAGE, READ, PRIVATE, file, os.O_RDONLY, 0)
        client.ok("lose", "dofork", BASE, SIZE)
        assert client.do("fork", "load", BASE) == str(FILE_BYTE)
        assert client.do("clone", "load", BASE + STRIDE) == "0"
