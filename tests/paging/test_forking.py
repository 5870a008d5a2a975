"""A process that forks past the library, with windows that its children inherit."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from bare import in_child
from conftest import ALIGNMENT, BASE, PAGE, Daemon, clients, eventually
from stops import arm, may_stop, reached

from libmshare import Region

SIZE = ALIGNMENT
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
READ, BOTH = 1, 3
SHARED = mmap.MAP_SHARED | 0x10
DOFORK = 11
MADVISE, CLONE = (28, 56) if os.uname().machine == "x86_64" else (233, 220)


@pytest.mark.shm_only
def test_what_is_made_read_only_meanwhile(
    make_daemon: Callable[..., Daemon], client_program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel protects nothing while a fork is on its way; the call returns when it has."""
    daemon = make_daemon(f"--alignment={ALIGNMENT}")
    may_stop(daemon)
    daemon.start()
    monkeypatch.setenv("MSHARE_ROOT", str(daemon.mount))
    says, said = os.pipe()
    goes_on, go_on = os.pipe()
    libc = ctypes.CDLL(None)

    def forks() -> None:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        with Region.attach("r"):
            ctypes.memset(BASE, 7, 1)
            where = ctypes.c_void_p(BASE)
            assert libc.syscall(MADVISE, where, ctypes.c_size_t(SIZE), DOFORK) == 0
            os.write(said, b"r")
            os.read(goes_on, 1)
            libc.syscall(CLONE, signal.SIGCHLD, 0, 0, 0, 0)
            os.read(goes_on, 1)
            ctypes.memset(BASE, 9, 1)  # each of them
            os.write(said, b"w")

    with clients(client_program, daemon) as spawn:
        first = spawn()
        first.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        first.ok("mmap", BASE, 4 * PAGE, BOTH, SHARED)
        second = in_child(forks)
        assert os.read(says, 1) == b"r"
        arm(daemon, "mprotect")
        first.send("mprotect", BASE, 4 * PAGE, READ)
        reached(daemon)
        os.write(go_on, b"x")
        wchan = Path(f"/proc/{second.pid}/wchan")
        eventually(lambda: "userfaultfd_event" in wchan.read_text(), "it waits for its fork")
        os.kill(daemon.pager(), signal.SIGCONT)
        assert first.result() == "0"
        os.write(go_on, b"xx")
        assert second.wait() == -signal.SIGSEGV
        eventually(lambda: daemon.sharers("r") == 1, "the child has ended, too")
        os.close(said)
        assert os.read(says, 1) == b"", "nobody has written"
        assert first.do("load", BASE) == "7"
        first.ok("unlink", "r")
    for fd in (says, goes_on, go_on):
        os.close(fd)
