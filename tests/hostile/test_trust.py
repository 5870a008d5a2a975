"""A program finds no daemon that somebody else pretends to be.

Who answers a program has its userfaultfd, and with it every page that the program has
not touched yet.  So a mount that an ordinary user has made is none of a daemon's, for
root and for others; and what a path leads to may be another thing at each system call.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from bare import become
from conftest import SUPPORT, compile_c
from hostile import MALLORY
from victim import ALICE

from libmshare import core
from msharefsd.control import wire
from msharefsd.control.wire import Op, ReplyFlag
from msharefsd.linux import syscalls, uffd

pytestmark = pytest.mark.shm_only
TRACEME, SYSCALL, SET_OPTIONS = 0, 24, 0x4200
EXIT_KILL, SYSCALL_GOOD = 1 << 20, 1
RENAME_EXCHANGE = 2


@dataclass
class FakeDaemon:
    """Answers as a daemon does; notes whether it was sent a userfaultfd."""

    path: Path
    taken: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(self.path))
        self.path.chmod(0o777)
        self._listener.listen(100)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._serve(self._listener.accept()[0])

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            while True:
                data, fds, _, _ = socket.recv_fds(sock, wire.MAX_REQUEST_BYTES, 16)
                for fd in fds:
                    if uffd.is_one(fd):
                        self.taken.append(f"a userfaultfd, with operation {data[6]}")
                    os.close(fd)
                if not data:
                    return
                op = int.from_bytes(data[6:8], sys.byteorder)
                flags = ReplyFlag.USER_MODE_ONLY if op == Op.USERFAULTFD else wire.NO_FLAGS
                error = 0 if op == Op.USERFAULTFD else 1
                sock.sendall(wire.Reply(op, error, flags).pack())

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture(scope="module", name="attacher")
def attacher_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = Path(f"/tmp/mshare-test-attacher-{os.getpid()}")
    directory.mkdir()
    directory.chmod(0o755)
    library = core.library_directory()
    if library is not None:
        shutil.copy(library / core.LIBRARY, directory)
    flags = ["-Wall", "-Wextra", "-Werror", "-Wl,-rpath,$ORIGIN"]
    yield compile_c(SUPPORT / "attacher.c", directory / "attacher", *flags)
    shutil.rmtree(directory)


@dataclass(frozen=True)
class Home:
    """What mallory has: a mount in `mounted`, and a plain directory of the same form."""

    path: Path
    fake: FakeDaemon

    def exchange(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        here = -100
        first, second = (os.fsencode(self.path / name) for name in ("D", "E"))
        assert libc.renameat2(here, first, here, second, RENAME_EXCHANGE) == 0


@pytest.fixture
def home(directory: Path) -> Iterator[Home]:
    path = directory / "mallory"
    for name in ("D/P", "E/P"):
        (path / name).mkdir(parents=True)
    fake = FakeDaemon(path / "E/P/.control")
    (path / "E/P/counter").write_bytes(b"x" * 16)
    (path / "E/P/counter").chmod(0o666)
    (path / "E/P/mshare_info").write_text("2097152\n")
    try:
        yield Home(path, fake)
    finally:
        fake.close()


def environment() -> dict[str, str]:
    return {"PATH": os.defpath, "MSHARE_RECONNECT_SECONDS": "0"}


class Traced:
    """The program, stopped at each system call."""

    def __init__(self, program: Path, uid: int) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
        self.pid = os.fork()
        if self.pid == 0:
            try:
                null = os.open(os.devnull, os.O_RDWR)
                for fd in range(3):
                    os.dup2(null, fd)
                if uid:
                    become(uid)
                self._libc.ptrace(TRACEME, 0, 0, 0)
                os.kill(os.getpid(), signal.SIGSTOP)
                os.execve(program, [str(program), "counter"], environment())
            finally:
                os._exit(1)
        os.waitpid(self.pid, 0)
        self._libc.ptrace(SET_OPTIONS, self.pid, 0, EXIT_KILL | SYSCALL_GOOD)

    def stops(self) -> Iterator[int]:
        """Their numbers; it goes on after each."""
        number = 0
        while True:
            self._libc.ptrace(SYSCALL, self.pid, 0, 0)
            _, status = os.waitpid(self.pid, 0)
            if os.WIFEXITED(status) or os.WIFSIGNALED(status):
                return
            yield number
            number += 1

    def opens(self, what: bytes) -> bool:
        """Whether what it is about to do has a path with that in it."""
        with contextlib.suppress(OSError, ValueError):
            words = Path(f"/proc/{self.pid}/syscall").read_text().split()
            with open(f"/proc/{self.pid}/mem", "rb") as memory:
                memory.seek(int(words[2], 16))
                return what in memory.read(64).split(b"\0")[0]
        return False


def run_and_exchange(attacher: Path, uid: int, home: Home, *at: int) -> None:
    """Run it; at those stops the two directories change places."""
    times = 0
    for number in Traced(attacher, uid).stops():
        if number in at:
            home.exchange()
            times += 1
    if times % 2:
        home.exchange()


@pytest.mark.parametrize("uid", [0, ALICE])
def test_a_mount_that_is_exchanged_for_a_directory_at_any_moment(
    uid: int, attacher: Path, home: Home
) -> None:
    """Nobody else may look into a mount of mallory's: she shows them something else."""
    device = os.open("/dev/fuse", os.O_RDWR)
    owner = f"fd={device},rootmode=40000,user_id={MALLORY},group_id={MALLORY}"
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV
    syscalls.mount("msharefs", str(home.path / "D/P"), "fuse.msharefs", flags, owner)
    try:
        first, last = -1, -1
        traced = Traced(attacher, uid)
        for last in traced.stops():
            if first < 0 and traced.opens(b"mountinfo"):
                first = last
        assert home.fake.taken == []
        if first < 0:
            return  # it does not search at all
        entries = range(first, last + 1, 2)
        for leave in entries:
            run_and_exchange(attacher, uid, home, leave)
            assert home.fake.taken == [], f"exchanged at stop {leave} of {last}"
            for come_back in (leave + 2, leave + 4, leave + 6):
                run_and_exchange(attacher, uid, home, leave, come_back)
                assert home.fake.taken == [], f"exchanged at {leave}, and at {come_back}"
    finally:
        os.close(device)
        for place in ("D/P", "E/P"):
            with contextlib.suppress(OSError):
                syscalls.umount(str(home.path / place), syscalls.MNT_DETACH)


@pytest.mark.parametrize("uid", [0, ALICE])
def test_a_mount_of_mallorys_that_everybody_may_look_into(
    uid: int, attacher: Path, home: Home
) -> None:
    with subprocess.Popen(
        [sys.executable, SUPPORT / "impostor.py", home.path / "D/P", str(MALLORY), home.fake.path],
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            done = subprocess.run(
                [attacher, "counter"],
                env=environment(),
                user=uid,
                group=uid,
                extra_groups=[],
                check=False,
                timeout=20,
            )
            assert done.returncode != 0
            assert home.fake.taken == []
        finally:
            server.kill()
            server.wait()
            syscalls.umount(str(home.path / "D/P"), syscalls.MNT_DETACH)
