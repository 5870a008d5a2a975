"""A name whose maker dies before it has memory: nothing is left, and nobody else's goes."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ALIGNMENT, BASE, Client, Daemon, clients, eventually

from msharefsd.mount.names import NAME_MAX

pytestmark = pytest.mark.shm_only
SIZE = 2 * ALIGNMENT
FIXED_SHARED = mmap.MAP_SHARED | 0x10
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
SYSCALL, SEIZE, INTERRUPT, SYSCALL_INFO = 24, 0x4206, 0x4207, 0x420E
GOOD = 1
"""PTRACE_O_TRACESYSGOOD: a stop at a system call has a number of its own."""
IN_CALL = signal.SIGTRAP | 0x80
ENTERS = 1
FTRUNCATE = 77 if os.uname().machine == "x86_64" else 46
WALL = 0x40000000
Spawn = Callable[..., Client]
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def ptrace(what: int, pid: int, data: int = 0) -> None:
    assert _libc.ptrace(what, pid, None, data) == 0, os.strerror(ctypes.get_errno())


def kill_at(client: Client, stop: int, *command: object) -> bool:
    """Kill it at such a stop, at a system call of the command; False if it has done it before."""
    ptrace(SEIZE, client.pid)
    ptrace(INTERRUPT, client.pid)
    os.waitpid(client.pid, WALL)
    client.send(*command)
    assert client.process.stdout is not None
    number = 0
    for _ in range(stop):
        ptrace(SYSCALL, client.pid, number)
        stopped = os.WSTOPSIG(os.waitpid(client.pid, WALL)[1])
        number = 0 if stopped == signal.SIGTRAP else stopped  # a signal is passed on
        if select.select([client.process.stdout], [], [], 0)[0]:
            client.kill()
            return False
    client.kill()
    return True


@pytest.mark.parametrize("start", [0, BASE])
def test_killed_at_any_system_call_it_leaves_nothing_without_memory(
    daemon: Daemon, client_program: Path, start: int
) -> None:
    """It has its name and its memory, or neither; and the next one gets the name."""
    seen = set()
    other = daemon.mount / "other"
    other.touch()  # is nobody's to take away
    for stop in range(2, 400, 2):  # one at its beginning, one at its end
        with clients(client_program, daemon) as spawn:
            client = spawn()
            under_way = kill_at(client, stop, "mshare", "r", start, SIZE, CREATE, 0o600)
            eventually(
                lambda: "r" not in os.listdir(daemon.mount) or has_memory(daemon),
                f"that nothing is left after stop {stop}",
            )
            left = "r" in os.listdir(daemon.mount)
            seen.add(left)
            again = spawn()
            if left:
                with contextlib.suppress(FileNotFoundError):  # it had begun, and is undone
                    os.unlink(daemon.mount / "r")
            again.ok("mshare", "r", start, SIZE, CREATE, 0o600)
            again.ok("unlink", "r")
            assert other.exists()
        if not under_way:
            break
    assert not under_way
    assert seen == {True, False}


def kill_before_it_has_a_size(pid: int, begin: Callable[[], None]) -> None:
    """Kill a pager when it is about to give new memory a size, for what was begun."""
    info = (ctypes.c_uint8 * 88)()
    ptrace(SEIZE, pid, GOOD)
    ptrace(INTERRUPT, pid)
    begin()
    number = 0
    while True:
        stopped = os.WSTOPSIG(os.waitpid(pid, WALL)[1])
        number = 0 if stopped in {signal.SIGTRAP, IN_CALL} else stopped
        if stopped == IN_CALL:
            _libc.ptrace(SYSCALL_INFO, pid, len(info), ctypes.addressof(info))
            call, fd = (int.from_bytes(info[at : at + 8], "little") for at in (24, 32))
            if info[0] == ENTERS and call == FTRUNCATE:
                file = Path(f"/proc/{pid}/fd/{fd}")
                if "msharefs" in file.readlink().name:
                    assert file.stat().st_size == 0
                    os.kill(pid, signal.SIGKILL)
                    return
        ptrace(SYSCALL, pid, number)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_pager_that_dies_when_memory_has_a_name_and_no_size(
    daemon: Daemon, client_program: Path, *, hidden: bool
) -> None:
    """shm_open() and ftruncate(): no memory was lost, and nothing is said that would be."""
    with clients(client_program, daemon) as spawn:
        spawn().ok("mshare", "first", BASE + 2 * SIZE, SIZE, CREATE, 0o600)  # there is a pager
        client = spawn()
        if hidden:
            client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
            client.ok("mmap", BASE, SIZE, 3, FIXED_SHARED)
            client.ok("store", BASE, 7)
            words: tuple[object, ...] = ("mprotect", BASE, SIZE // 2, 0)
        else:
            words = ("mshare", "r", BASE, SIZE, CREATE, 0o600)
        kill_before_it_has_a_size(daemon.pager(), lambda: client.send(*words))
        client.result()  # it is told that it was not done, or it has been done anew
        if hidden:
            client.do("mprotect", BASE, SIZE // 2, 3)
            assert client.do("load", BASE) == "7"
            client.ok("store", BASE + ALIGNMENT // 2, 8)
        else:
            again = spawn()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(daemon.mount / "r")
            again.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
            again.ok("mmap", BASE, SIZE, 3, FIXED_SHARED)
            again.ok("store", BASE, 8)


def has_memory(daemon: Daemon) -> bool:
    try:
        info = os.open(daemon.mount / "r", os.O_RDONLY)
    except FileNotFoundError:
        return False
    size = int.from_bytes(os.read(info, 16)[8:], "little")
    os.close(info)
    return size > 0


def test_what_is_made_by_open_stays(daemon: Daemon) -> None:
    with (daemon.mount / "mine").open("x"):
        pass
    with (daemon.mount / ".making-r").open("x"):
        assert "r" in os.listdir(daemon.mount)
    eventually(lambda: "r" not in os.listdir(daemon.mount), "it has gone with its maker")
    with pytest.raises(FileExistsError):
        os.open(daemon.mount / ".making-mine", CREATE)
    with pytest.raises(OSError, match="too long"):
        os.open(daemon.mount / (".making-" + "x" * (NAME_MAX + 1)), CREATE)
    for odd in ("", ".hidden", "mshare_info", ".making-x"):
        with pytest.raises(PermissionError):
            os.open(daemon.mount / f".making-{odd}", CREATE)
    long = "x" * NAME_MAX
    with (daemon.mount / f".making-{long}").open("x") as first, (daemon.mount / long).open():
        first.close()
        assert long in os.listdir(daemon.mount), "somebody has it open"
    eventually(lambda: long not in os.listdir(daemon.mount), "and then nobody")
    assert (daemon.mount / "mine").exists()


def test_a_maker_that_dies_while_no_daemon_is_there(daemon: Daemon) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.open(daemon.mount / ".making-r", CREATE)
        os.open(daemon.mount / ".making-s", CREATE)
        os.write(writing, b".")
        signal.pause()
        os._exit(1)
    os.read(reading, 1)
    alive = os.open(daemon.mount / ".making-t", CREATE)
    (daemon.mount / "mine").touch()
    daemon.kill()
    daemon.expected.append("taking down the mount")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    daemon.start()
    # (The next call of a maker that lives opens it again.)
    assert {"mine", "t"} <= set(os.listdir(daemon.mount))
    assert not {"r", "s"} & set(os.listdir(daemon.mount))
    os.close(os.open(daemon.mount / "t", os.O_RDWR))
    eventually(lambda: "t" not in os.listdir(daemon.mount), "it has given up")
    for each in (alive, reading, writing):
        os.close(each)
