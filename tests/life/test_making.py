"""A name whose maker dies before it has memory: nothing is left, and nobody else's goes."""

from __future__ import annotations

import contextlib
import ctypes
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
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
SYSCALL, SEIZE, INTERRUPT = 24, 0x4206, 0x4207
WALL = 0x40000000
Spawn = Callable[..., Client]
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def ptrace(what: int, pid: int, number: int = 0) -> None:
    assert _libc.ptrace(what, pid, None, number) == 0, os.strerror(ctypes.get_errno())


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
