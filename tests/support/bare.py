"""A client without libmshare: it speaks the protocol itself, and says what it likes."""

from __future__ import annotations

import array
import contextlib
import ctypes
import os
import signal
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from msharefsd.control import wire
from msharefsd.control.wire import Op
from msharefsd.linux import syscalls, uffd
from msharefsd.linux.uffd import Mode

PAGE = syscalls.PAGE


@dataclass(frozen=True)
class Answer:
    error: int
    flags: int
    start: int
    size: int
    message: str
    fd: int


class Bare:
    """One connection.  Nothing here checks what it sends."""

    def __init__(self, mount: Path, seconds: float = 20.0) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(seconds)
        sock.connect(f"{mount}/.control")
        self._begin(sock, mount)

    @classmethod
    def on(cls, sock: socket.socket, mount: Path) -> Self:
        """One whose connection there is."""
        made = cls.__new__(cls)
        made._begin(sock, mount)
        return made

    def _begin(self, sock: socket.socket, mount: Path) -> None:
        self.sock = sock
        self.mount = mount
        self.uffd = self.backing = -1
        self.start = self.size = 0

    def send(self, data: bytes, *fds: int) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([data], rights)

    def receive(self) -> Answer:
        """The next answer; notes are left out."""
        while True:
            data, fds, _, _ = socket.recv_fds(self.sock, wire.REPLY.size, 1)
            if not data:
                raise ConnectionResetError("it hung up")
            _, _, op, error, flags, start, size, message = wire.REPLY.unpack(data)
            if op != wire.NOTE:
                text = message.rstrip(b"\0").decode() if error else ""  # or details
                return Answer(error, flags, start, size, text, fds[0] if fds else -1)

    def call(
        self,
        op: int,
        *fds: int,
        start: int = 0,
        size: int = 0,
        oflags: int = 0,
        flags: int = 0,
        objects: tuple[tuple[int, int, int, int, int], ...] = (),
    ) -> Answer:
        head = (wire.MAGIC, wire.VERSION, op, start, size, oflags, flags, len(objects), 0, 0, 0)
        body = b"".join(wire.OBJECT.pack(*each) for each in objects)
        self.send(wire.REQUEST.pack(*head) + body, *fds)
        return self.receive()

    def attach(self, name: str, *, oflags: int = os.O_RDWR, own: int | None = None) -> Answer:
        """Attach as libmshare would; `own` in place of a userfaultfd of our own."""
        self.uffd = uffd.open_new() if own is None else own
        proof = os.open(self.mount / name, oflags)
        answer = self.call(
            Op.ATTACH, proof, self.uffd, oflags=oflags, flags=wire.RequestFlag.AS_IT_LIES
        )
        os.close(proof)
        self.backing, self.start, self.size = answer.fd, answer.start, answer.size
        return answer

    def map_window(self, *, mode: Mode = Mode.MISSING) -> None:
        syscalls.mmap(
            self.start,
            self.size,
            syscalls.PROT_READ | syscalls.PROT_WRITE,
            syscalls.MAP_SHARED | syscalls.MAP_FIXED | syscalls.MAP_NORESERVE,
            self.backing,
            0,
        )
        uffd.register(self.uffd, self.start, self.size, mode)

    def mmap(self, offset: int, length: int, prot: int, flags: int, *fds: int) -> Answer:
        """The call that acts on the region, MAP_FIXED."""
        one = ((offset, length, 0, prot, flags | syscalls.MAP_FIXED),)
        return self.call(Op.MMAP, *fds, objects=one)

    def byte(self, offset: int) -> int | None:
        """Have the kernel read a byte of the window; None for EFAULT."""
        memory = (ctypes.c_char * 1).from_address(self.start + offset)
        reader, writer = os.pipe()
        try:
            with contextlib.suppress(OSError):
                os.write(writer, memory)
                return os.read(reader, 1)[0]
        finally:
            os.close(reader)
            os.close(writer)
        return None

    def close(self) -> None:
        for fd in (self.uffd, self.backing):
            if fd >= 0:
                os.close(fd)
        self.uffd = self.backing = -1
        self.sock.close()


@dataclass
class Child:
    """A forked process that runs a function of the test's."""

    pid: int
    code: int | None = None
    """Its exit code, or minus the signal that ended it; None while it runs."""

    def poll(self, options: int = os.WNOHANG) -> int | None:
        """The code, if it has ended."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self) -> int:
        """The code, when it has ended."""
        code = self.poll(0)
        assert code is not None
        return code

    def kill(self) -> None:
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


def become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    pr_set_dumpable = 4
    ctypes.CDLL(None).prctl(pr_set_dumpable, 1, 0, 0, 0)


def in_child(function: Callable[[], object], *, uid: int = 0, seconds: int = 50) -> Child:
    """Run `function` in a child: exit code 0 if it returns, 1 if it raises.

    After `seconds` SIGALRM ends it: waiting in a page fault does not hold that up.
    """
    pid = os.fork()
    if pid:
        return Child(pid)
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        if uid:
            become(uid)
        function()
    except BaseException:  # noqa: BLE001 - pytest must not go on here, whatever it is
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
