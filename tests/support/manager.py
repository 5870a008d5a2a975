"""A service manager that keeps descriptors as systemd does (sd_pid_notify_with_fds(3)).

It has systemd's habits: a descriptor of an open file that it has already is not stored
again, what does not fit is thrown away, and nothing of that is answered.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import socket
import sys
import threading
from pathlib import Path
from typing import Final

from conftest import BIN, Daemon

_SYS_KCMP: Final = {"x86_64": 312, "aarch64": 272}
_PASS: Final = """
import fcntl, os, sys
count = int(sys.argv[1])
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 500) for fd in sys.argv[3 : 3 + count]]
for place, fd in enumerate(high):
    os.dup2(fd, 3 + place)
    os.close(fd)
if count:
    os.environ.update(LISTEN_FDS=str(count), LISTEN_FDNAMES=sys.argv[2])
    os.environ["LISTEN_PID"] = str(os.getpid())
program = sys.argv[3 + count :]
os.execv(program[0], program)
"""


def is_same_file(one: int, other: int) -> bool:
    """Whether two descriptors are of one open file description (kcmp(2))."""
    pid = os.getpid()
    number = _SYS_KCMP[platform.machine()]
    return bool(ctypes.CDLL(None).syscall(number, pid, pid, 0, one, other) == 0)


class ServiceManager:
    """Its socket, and what it keeps; `close()` it whatever happens."""

    def __init__(self, directory: Path, most: int = 65536) -> None:
        """`most` is FileDescriptorStoreMax=."""
        self.address = directory / "notify"
        self.most = most
        self.stored: list[tuple[str, int]] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(self.address))
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self._sock, 4096, 64)
            lines = data.decode().splitlines()
            if "END" in lines:
                return
            name = next((line[7:] for line in lines if line.startswith("FDNAME=")), "stored")
            if "FDSTORE=1" in lines:
                self._store(name, fds)
            else:
                for fd in fds:  # BARRIER=1, and what it does not know
                    os.close(fd)
            if "FDSTOREREMOVE=1" in lines:
                for each in [each for each in self.stored if each[0] == name]:
                    self.stored.remove(each)
                    os.close(each[1])

    def _store(self, name: str, fds: list[int]) -> None:
        for fd in fds:
            full = len(self.stored) >= self.most
            if full or any(is_same_file(fd, other) for _, other in self.stored):
                os.close(fd)
            else:
                self.stored.append((name, fd))

    def launch(self, daemon: Daemon) -> None:
        """Start it as a service, with what is kept for it."""
        names = ":".join(name for name, _ in self.stored)
        fds = [fd for _, fd in self.stored]
        words = [sys.executable, "-c", _PASS, str(len(fds)), names, *map(str, fds)]
        environment = {**os.environ, "NOTIFY_SOCKET": str(self.address), "FDSTORE": str(self.most)}
        daemon.launch([*words, str(BIN / "msharefsd")], env=environment, pass_fds=fds)

    def close(self) -> None:
        """Forget everything."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"END", str(self.address))
        self._thread.join()
        self._sock.close()
        for _, fd in self.stored:
            with contextlib.suppress(OSError):
                os.close(fd)
