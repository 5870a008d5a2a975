"""What the daemon tells a service manager, on a NOTIFY_SOCKET of the test's own."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from conftest import ALIGNMENT, BASE, BIN, CONNECTIONS, Daemon, clients, eventually

from msharefsd.life.notify import STATUS_SECONDS, Manager
from msharefsd.life.selfcheck import SelfCheck
from msharefsd.linux import mounts, syscalls

SIZE = 2 * ALIGNMENT
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
SECOND = 1_000_000

pytestmark = pytest.mark.shm_only


class Listener:
    """A service manager, as far as its socket goes."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.heard: list[str] = []

    def environment(self, **more: object) -> dict[str, str]:
        return {"NOTIFY_SOCKET": self.address} | {key: str(value) for key, value in more.items()}

    def listen(self) -> list[str]:
        """Every line that has come until now."""
        with contextlib.suppress(BlockingIOError):
            while True:
                message = self.socket.recv(4096, socket.MSG_DONTWAIT).decode()
                self.heard += message.split("\n")
        return self.heard


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, directory: Path) -> Iterator[Listener]:
    path = str(directory / "notify")
    made = Listener(path if request.param == "path" else f"@{path}")
    with made.socket:
        yield made


async def always(seconds: float) -> bool:
    """A mount that answers."""
    return True


# -- the daemon --


def test_a_daemon_tells_how_it_is_from_start_to_end(
    make_daemon: Callable[..., Daemon], listener: Listener, client_program: Path
) -> None:
    daemon = make_daemon(f"--alignment={ALIGNMENT}")
    daemon.start(env=os.environ | listener.environment(WATCHDOG_USEC=SECOND))
    eventually(lambda: "READY=1" in listener.listen(), "READY")
    assert listener.heard[1] == f"STATUS=serving {daemon.mount}: regions 0, sharers 0"
    eventually(lambda: listener.listen().count("WATCHDOG=1") > 2, "signs of life")
    with clients(client_program, daemon) as start:
        client = start()
        client.ok("map", BASE, SIZE, 1)
        client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        figures = f"STATUS=serving {daemon.mount}: regions 1, sharers 1"
        eventually(lambda: figures in listener.listen(), "live figures")
    assert "STOPPING=1" not in listener.listen()
    daemon.stop()
    assert listener.listen()[-2:] == ["STOPPING=1", "STATUS=stopping"]


def test_a_daemon_that_is_stopped_gives_no_sign_of_life(
    make_daemon: Callable[..., Daemon], directory: Path
) -> None:
    listener = Listener(str(directory / "notify"))
    with listener.socket:
        daemon = make_daemon()
        daemon.start(env=os.environ | listener.environment(WATCHDOG_USEC=SECOND // 5))
        eventually(lambda: "WATCHDOG=1" in listener.listen(), "a sign of life")
        assert daemon.process is not None
        # Frozen, as SIGSTOP does it: the thread that waits for the mount as well.
        os.kill(daemon.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, daemon.pid, os.WSTOPPED | os.WNOWAIT)
        listener.listen().clear()
        with pytest.raises(subprocess.TimeoutExpired):
            daemon.process.wait(1)
        assert listener.listen() == []
        os.kill(daemon.pid, signal.SIGCONT)
        eventually(lambda: "WATCHDOG=1" in listener.listen(), "a sign of life")
        daemon.stop()


@pytest.mark.parametrize(
    "address", ["/nonexistent/notify", "@nobody-listens", "/" + "long" * 40, "vsock:2:1234"]
)
def test_a_manager_that_cannot_be_reached_costs_a_line_in_the_log(
    make_daemon: Callable[..., Daemon], address: str
) -> None:
    daemon = make_daemon()
    daemon.expected.append("cannot notify NOTIFY_SOCKET=")
    daemon.start(env=os.environ | {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "100000"})
    eventually(lambda: "cannot notify" in daemon.log(), "the complaint")
    assert (daemon.mount / "mshare_info").read_text() == f"{512 << 30}\n"
    daemon.stop()
    assert daemon.log().count("cannot notify") == 1


def test_without_a_manager_nothing_is_said(make_daemon: Callable[..., Daemon]) -> None:
    """WATCHDOG_USEC alone, in an environment that was inherited, means nothing."""
    environment = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"}
    daemon = make_daemon()
    daemon.start(env=environment | {"WATCHDOG_USEC": "100000", "WATCHDOG_PID": "0"})
    daemon.stop()


def test_wrong_settings_are_not_ready(directory: Path) -> None:
    with Listener(str(directory / "notify")).socket as sock:
        done = subprocess.run(
            [BIN / "msharefsd", "--alignment=3"],
            env=os.environ | {"NOTIFY_SOCKET": str(directory / "notify")},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 2
        with pytest.raises(BlockingIOError):
            sock.recv(4096, socket.MSG_DONTWAIT)


# -- the protocol --


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "1500000"}, 1.5),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": str(os.getpid())}, 1.5),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": "me"}, None),
    ],
)
def test_whose_watchdog_it_is(environment: dict[str, str], seconds: float | None) -> None:
    assert Manager({"NOTIFY_SOCKET": "@x", **environment}).watchdog_seconds == seconds
    assert Manager(environment).watchdog_seconds is None


def test_a_line_is_a_line(directory: Path) -> None:
    """What has a newline in it, a mountpoint perhaps, is no further assignment."""
    listener = Listener(str(directory / "notify"))
    with listener.socket:
        Manager(listener.environment()).send("STATUS=serving /a\nMAINPID=1")
        assert listener.listen() == ["STATUS=serving /a MAINPID=1"]


async def test_ready_is_said_again_while_the_manager_does_not_read(
    nursery: trio.Nursery, directory: Path
) -> None:
    listener = Listener(str(directory / "notify"))
    with listener.socket:
        manager = Manager(listener.environment())
        queued = 0
        while manager.send("STATUS=full"):
            queued += 1
        nursery.start_soon(manager.run, lambda: "fine", always)
        await trio.testing.wait_all_tasks_blocked()
        assert listener.listen().count("STATUS=full") == queued
        with trio.fail_after(20):
            while "READY=1" not in listener.listen():
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


async def test_the_status_is_sent_when_it_changes(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, directory: Path
) -> None:
    listener = Listener(str(directory / "notify"))
    with listener.socket:
        text = "one"
        nursery.start_soon(Manager(listener.environment()).run, lambda: text, always)
        await trio.sleep(10 * STATUS_SECONDS + 1)
        text = "two"
        await trio.sleep(10 * STATUS_SECONDS)
        assert listener.listen() == ["READY=1", "STATUS=one", "STATUS=two"]
        nursery.cancel_scope.cancel()


async def test_a_mount_that_does_not_answer_gives_no_sign_of_life(
    nursery: trio.Nursery,
    autojump_clock: trio.testing.MockClock,
    directory: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    listener = Listener(str(directory / "notify"))
    result: bool | OSError = True

    async def answers(seconds: float) -> bool:
        assert seconds == 5
        if isinstance(result, OSError):
            raise result
        if not result:
            await trio.sleep(seconds)
            return False
        return True

    async def lives(seconds: float) -> int:
        listener.listen().clear()
        await trio.sleep(seconds)
        return listener.listen().count("WATCHDOG=1")

    with listener.socket:
        manager = Manager(listener.environment(WATCHDOG_USEC=10 * SECOND))
        nursery.start_soon(manager.run, lambda: "fine", answers)
        assert await lives(31) == 7
        result = False
        assert await lives(30) == 0
        assert caplog.text.count("the mount does not answer") == 1
        result = True
        assert await lives(30) == 6
        result = OSError(errno.EMFILE, "no process can be had")
        assert await lives(30) == 6
        nursery.cancel_scope.cancel()


# -- the check --


async def test_a_question_is_not_put_twice(directory: Path) -> None:
    """While one hangs, the next look waits for the same process."""
    file = directory / "mshare_info"
    root = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    with contextlib.closing(SelfCheck(root)) as check:
        assert not await check.answers(20)  # there is no such file
        os.mkfifo(file)
        assert not await check.answers(0.1)
        assert not await check.answers(0.1)
        # It waits for a writer; had a second been started, it would still wait.
        os.close(os.open(file, os.O_WRONLY))
        assert await check.answers(20)
        file.unlink()
        file.touch()
        assert await check.answers(20)
    os.close(root)


HANGS = """
import os, sys, pyfuse3, trio
from msharefsd.life.notify import Manager
from msharefsd.life.selfcheck import SelfCheck

class Hangs(pyfuse3.Operations):
    async def getattr(self, inode, ctx=None):
        found = pyfuse3.EntryAttributes()
        found.st_ino, found.st_mode, found.st_nlink = inode, 0o40755, 2
        return found

    async def lookup(self, parent, name, ctx=None):
        print("asked", flush=True)
        await trio.sleep_forever()

async def main():
    pyfuse3.init(Hangs(), sys.argv[1], {"fsname=hangs"})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        root = await trio.to_thread.run_sync(os.open, sys.argv[1], os.O_PATH)
        await Manager().run(lambda: "", SelfCheck(root).answers)

trio.run(main)
"""


def test_a_daemon_whose_mount_hangs_can_be_killed(directory: Path) -> None:
    """A thread of its own in the mount would not let it end, and the mount not hang up."""
    listener = Listener(str(directory / "notify"))
    mountpoint = directory / "m"
    mountpoint.mkdir()
    with listener.socket:
        environment = os.environ | listener.environment(WATCHDOG_USEC=SECOND)
        process = subprocess.Popen(
            [sys.executable, "-c", HANGS, str(mountpoint)],
            stdout=subprocess.PIPE,
            env=environment,
            cwd="/",
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"asked\n"
        mount = mounts.top_mount(str(mountpoint))
        assert mount is not None
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(2)
        finally:
            process.kill()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                (CONNECTIONS / str(mount.device[1]) / "abort").write_text("1")
                raise
            finally:
                process.stdout.close()
                syscalls.umount(str(mountpoint), syscalls.MNT_DETACH)
        assert "READY=1" in listener.listen()
        assert "WATCHDOG=1" not in listener.heard
