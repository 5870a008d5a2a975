"""Holes that were touched, many of them, by writers and readers; and strange processes."""

from __future__ import annotations

import errno
import mmap
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import ALIGNMENT, BASE, PAGE, Client, Daemon, clients, eventually
from stops import arm, may_stop, reached, stopped

SIZE = 4 * ALIGNMENT
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
READ, BOTH = 1, 3
SHARED, PRIVATE = mmap.MAP_SHARED | 0x10, mmap.MAP_PRIVATE | 0x10
STALE = "taking down the mount"
HOLES = [*range(3, 40), *range(50, 250, 2)]
"""Some side by side, and more of them that are not than a call clears of a reader's."""

Spawn = Callable[..., Client]

pytestmark = pytest.mark.shm_only  # on huge pages all writers have one page table


@pytest.fixture(name="three")
def three_fixture(spawn: Spawn) -> tuple[Client, Client, Client]:
    """Two that write, and a reader."""
    first, second, reader = spawn(), spawn(), spawn()
    first.ok("mshare", "r", BASE, SIZE, CREATE, 0o644)
    second.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    reader.ok("mshare", "r", BASE, SIZE, os.O_RDONLY, 0)
    return first, second, reader


def at(page: int) -> int:
    return BASE + page * PAGE


def loads(client: Client, page: int, value: str) -> bool:
    return client.do("load", at(page)) == value


def touch(client: Client) -> None:
    for page in HOLES:
        assert client.do("load", at(page)) == "SIGBUS"


def restart(daemon: Daemon) -> None:
    daemon.expected.append(STALE)
    daemon.kill()
    daemon.start()


@pytest.mark.parametrize("killed", [False, True])
def test_holes_that_were_touched_can_be_mapped(
    three: tuple[Client, Client, Client], daemon: Daemon, *, killed: bool
) -> None:
    first, second, reader = three
    touch(second)
    touch(reader)
    if killed:
        restart(daemon)
    first.ok("mmap", BASE, 300 * PAGE, BOTH, SHARED)
    if not killed:
        assert daemon.backings()[0].stat().st_blocks == 0, "nothing stays of clearing them"
    for page in HOLES:
        assert second.do("load", at(page)) == "0"
    for page in HOLES:
        eventually(partial(loads, reader, page, "0"), "the reader has it")
    for page in (*HOLES, 0, 299):
        first.ok("store", at(page), 7)
    for client in three:
        assert [client.do("load", at(page)) for page in HOLES] == ["7"] * len(HOLES)


def test_a_file_is_there_where_holes_were_touched(
    three: tuple[Client, Client, Client], directory: Path
) -> None:
    first, second, reader = three
    path = directory / "file"
    path.write_bytes(b"".join(bytes([page % 200 + 1]) * PAGE for page in range(300)))
    touch(second)
    touch(reader)
    first.ok("mmap", BASE, 300 * PAGE, BOTH, SHARED, path, os.O_RDWR, 0)
    for page in HOLES:
        assert second.do("load", at(page)) == str(page % 200 + 1)
    for page in HOLES:
        eventually(partial(loads, reader, page, str(page % 200 + 1)), "the reader has it")
    # And is it protected: what is written is seen.
    for page in HOLES:
        second.ok("store", at(page), 250)
    first.ok("msync", BASE, 300 * PAGE, 4)
    content = path.read_bytes()
    assert {content[page * PAGE] for page in HOLES} == {250}
    assert content.count(250) == len(HOLES)


def test_hidden_memory_is_there_where_holes_were_touched(
    three: tuple[Client, Client, Client],
) -> None:
    first, second, reader = three
    touch(second)
    touch(reader)
    first.ok("mmap", BASE, 300 * PAGE, 0, SHARED)
    first.ok("mprotect", BASE, 300 * PAGE, READ)
    for page in HOLES:
        assert second.do("load", at(page)) == "0"
        assert second.do("store", at(page), 1) == "SIGSEGV"
    for page in HOLES:
        eventually(partial(loads, reader, page, "0"), "the reader has it")


def test_a_reader_is_refused_and_nothing_of_it_stays(
    three: tuple[Client, Client, Client],
) -> None:
    first, second, reader = three
    first.ok("mmap", BASE, 16 * PAGE, BOTH, SHARED)
    first.ok("fill", BASE, 16 * PAGE, 9)
    first.ok("mprotect", BASE, 16 * PAGE, 0)
    for page in range(16):
        assert reader.do("from_memory", at(page), 1) == f"-{errno.EFAULT}"
        assert second.do("load", at(page)) == "SIGSEGV"
    first.ok("mprotect", BASE, 16 * PAGE, BOTH)
    for page in range(16):
        eventually(partial(loads, reader, page, "9"), "it has it again")
        assert second.do("load", at(page)) == "9"


def test_a_process_of_another_pid_namespace(
    three: tuple[Client, Client, Client], spawn: Spawn
) -> None:
    first, _, _ = three
    first.ok("mmap", BASE, 8 * PAGE, READ, SHARED)
    stranger = spawn(before=["unshare", "--pid", "--fork", "--mount-proc"])
    stranger.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    for _ in range(3):
        assert stranger.do("store", at(1), 1) == "SIGSEGV"
        assert stranger.do("to_memory", at(2), 1) == f"-{errno.EFAULT}"
        eventually(partial(loads, stranger, 2, "0"), "back again")
    assert stranger.do("load", at(9)) == "SIGBUS"


def test_what_is_hidden_is_not_written_while_its_poison_goes(
    make_daemon: Callable[..., Daemon], client_program: Path
) -> None:
    """For a moment a page is there, and whoever calls the system in it is refused all the same."""
    daemon = make_daemon(f"--alignment={ALIGNMENT}")
    may_stop(daemon)
    daemon.start()
    with clients(client_program, daemon) as spawn:
        first, second = spawn(), spawn()
        first.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        second.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        for page, hidden in ((0, False), (16, True)):  # one was never touched
            first.ok("mmap", at(page), PAGE, BOTH, SHARED)
            if hidden:
                first.ok("store", at(page), 9)
            first.ok("mprotect", at(page), PAGE, 0)
            arm(daemon, "poison.cleared")
            assert first.do("to_memory", at(page), 1) == str(-errno.EFAULT)
            reached(daemon)
            second.send("to_memory", at(page), 1)
            eventually(lambda: _waits(second.pid), "it waits for the pager")
            for pid in daemon.processes():
                os.kill(pid, signal.SIGCONT)
            assert second.result() == str(-errno.EFAULT)
            first.ok("mprotect", at(page), PAGE, BOTH)
            eventually(partial(loads, first, page, "9" if hidden else "0"), "what belongs there")


@pytest.mark.parametrize("barrier", ["poison.cleared", "mmap", "fill.read"])
def test_a_file_that_is_mapped_where_poison_is_is_never_zeros(
    make_daemon: Callable[..., Daemon], client_program: Path, directory: Path, barrier: str
) -> None:
    """Whoever looks, whenever, and if the daemon is killed: nothing stands in for the page."""
    daemon = make_daemon(f"--alignment={ALIGNMENT}")
    may_stop(daemon)
    daemon.start()
    path = directory / "file"
    path.write_bytes(b"\7" * 8 * PAGE)
    with clients(client_program, daemon) as spawn:
        first, second, reader = spawn(), spawn(), spawn()
        first.ok("mshare", "r", BASE, SIZE, CREATE, 0o644)
        second.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        reader.ok("mshare", "r", BASE, SIZE, os.O_RDONLY, 0)
        for each in (first, reader):
            assert each.do("load", at(2)) == "SIGBUS"
        arm(daemon, barrier)
        first.send("mmap", BASE, 8 * PAGE, READ, SHARED, path, os.O_RDONLY, 0)
        eventually(
            lambda: first.has_result() or any(map(stopped, daemon.processes())), "it has come to it"
        )
        if first.has_result():
            assert barrier == "poison.cleared"
            assert second.do("load", at(2)) == "7"
        else:
            assert barrier != "poison.cleared", "something is there that is not the file's"
            reached(daemon)
            second.send("load", at(2))
            restart(daemon)
            assert second.result() == "7"
        assert first.result() == "0"
        assert first.do("load", at(2)) == "7"
        eventually(partial(loads, reader, 2, "7"), "the reader has it")


def test_what_a_dead_daemon_has_left_protected_can_be_written(
    three: tuple[Client, Client, Client], daemon: Daemon
) -> None:
    """Also amid memory where nothing is registered for that: it costs one fault, and no more."""
    first, second, _ = three
    hidden = 8
    first.ok("mmap", at(0), 16 * PAGE, BOTH, SHARED)
    first.ok("mprotect", at(hidden), PAGE, 0)
    assert first.do("to_memory", at(hidden), 1) == str(-errno.EFAULT)
    first.ok("munmap", at(200), PAGE)  # the refusal is over
    restart(daemon)
    first.ok("mprotect", at(hidden), PAGE, BOTH)
    second.ok("store", at(hidden), 5)
    for client in (first, second):
        assert client.do("load", at(hidden)) == "5"
        client.ok("store", at(hidden), 5)


def _waits(pid: int) -> bool:
    return "handle_userfault" in Path(f"/proc/{pid}/wchan").read_text()
