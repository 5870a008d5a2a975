"""Who has a run directory, or a user's memory in it: one process at a time.

A lock is a file that is locked (flock(2)), with the holder's pid and start time in it.  The
kernel lets go of it when the process has ended.  But a process that was killed has not ended
as long as one of its threads hangs in the kernel, for what some client holds: it has its
descriptors until then, and will never run another instruction of ours.  So whoever comes
next does not wait for that: it kills the holder, and when the holder's first thread is gone
(a zombie) it takes a new file in the place of the old one.  What the threads that are left do
is the end of one system call each.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import time
from pathlib import Path
from typing import Final

from msharefsd.errors import StartError
from msharefsd.linux import processes

log = logging.getLogger(__name__)

FILE: Final = "lock"
TRIES: Final = 50
PAUSE_SECONDS: Final = 0.02


class HeldError(Exception):
    """Another process has it; the text says which."""


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _try(fd: int, path: Path) -> bool:
    """Lock it, if it is free and still the file of that name; and sign it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    try:
        if os.stat(path).st_ino != os.fstat(fd).st_ino:
            return False
    except FileNotFoundError:
        return False
    os.ftruncate(fd, 0)
    os.pwrite(fd, b"%d %d\n" % (os.getpid(), processes.started(os.getpid())), 0)
    return True


def _holder(fd: int) -> int:
    """The process that has signed it, if it is still that one; else 0."""
    try:
        pid, started = map(int, os.pread(fd, 64, 0).split())
    except ValueError:
        return 0
    return pid if pid > 0 and processes.started(pid) == started else 0


def take(directory: Path) -> int:
    """Take the lock of a directory, or raise HeldError at once.  Raises OSError."""
    path = directory / FILE
    while True:
        fd = _open(path)
        if _try(fd, path):
            return fd
        pid = _holder(fd)
        replaced = not os.path.exists(path) or os.stat(path).st_ino != os.fstat(fd).st_ino
        os.close(fd)
        if not replaced:
            raise HeldError(f"process {pid}" if pid else "another process")


def take_over(directory: Path) -> int:
    """Take the lock from whoever has it, who is killed for that.

    Raises HeldError if that process hangs in the kernel with its first thread; OSError.
    """
    path = directory / FILE
    for _ in range(TRIES):
        with contextlib.suppress(HeldError):
            return take(directory)
        fd = _open(path)
        pid = _holder(fd)
        os.close(fd)
        if pid:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
            if processes.state(pid) == "Z" and not _threads_run(pid):
                log.warning("process %d has been killed and does not end: going on without it", pid)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
        time.sleep(PAUSE_SECONDS)
    raise HeldError(
        f"process {pid} hangs in the kernel ({processes.read_proc(pid, 'wchan') or '?'})"
    )


def _threads_run(pid: int) -> bool:
    """Whether a thread of a process that was killed may still do anything of ours."""
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            if processes.state(pid, int(thread)) not in ("D", "Z", "X", ""):
                return True
    return False


def take_run_directory(directory: Path) -> int:
    """The daemon's own, from nobody who lives.  Raises StartError."""
    try:
        return take(directory)
    except HeldError as error:
        raise StartError(
            f"another msharefsd holds {directory} ({error}): stop that one first"
        ) from None
    except OSError as error:
        raise StartError(f"cannot use the run directory {directory}: {error.strerror}") from error
