"""Whose region a connection's first message is about: a process of its sender's looks.

Every close(2) of a file asks the server of its file system, not only the last one
(filp_flush(), fs/open.c).  One that does not answer holds up whoever closes, and SIGKILL does
not end that.  To look at a descriptor is to have it, and then to close it.  So the front does
that for root alone: it sends the connection of anybody else to a looker of that user's, which
answers first and closes then.  If that hangs, its user makes no connections, and others do.

A looker has its socket and no rights.  It ends with the front, or when nobody needs it.
"""

from __future__ import annotations

import array
import contextlib
import logging
import os
import pwd
import socket
import struct
from dataclasses import dataclass, field
from typing import Final, NoReturn

import trio
from setproctitle import setproctitle

from msharefsd.control.receiving import CREDENTIALS_ROOM
from msharefsd.front.starter import Kind, Starter
from msharefsd.linux import priority, processes, syscalls
from msharefsd.linux.syscalls import FileIdentity
from msharefsd.security import privileges

log = logging.getLogger(__name__)

IDLE_SECONDS: Final = 1.0
AGAIN_SECONDS: Final = 0.2
SILENT_SECONDS: Final = 10.0
"""After how long it is said that one does not answer."""
_ROOM: Final = CREDENTIALS_ROOM + socket.CMSG_LEN(4)
"""For who has sent a message, and one descriptor."""
_LOOK: Final = socket.MSG_PEEK | socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
_ANSWER: Final = struct.Struct("=IIQI")
_NOTHING: Final = FileIdentity(0, 0, 0, 0)


def _first(sock: socket.socket) -> tuple[FileIdentity, list[int]]:
    """Which file the first descriptor of the message that waits is of.

    Raises OSError.  It is a duplicate, and to be closed.
    """
    with contextlib.suppress(ConnectionResetError):  # what came before it is there
        sock.recv(0, _LOOK)
    fds = [
        fd
        for level, kind, payload in sock.recvmsg(1, _ROOM, _LOOK)[1]
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for fd in array.array("i", payload[: len(payload) - len(payload) % 4])
    ]
    return syscalls.identify(fds[0]) if fds else _NOTHING, fds


@dataclass(slots=True)
class _Looker:
    """One, as the front sees it."""

    pid: int
    channel: socket.socket
    used: float
    closes: bool = False
    """It has answered, and has not said yet that it has closed what it looked at."""

    async def ask(self, sock: socket.socket) -> FileIdentity | None:
        """None if it has ended.  Raises OSError."""
        try:
            while not self.has_closed():
                await trio.lowlevel.wait_readable(self.channel)
            socket.send_fds(self.channel, [b"x"], [sock.fileno()])
            await trio.lowlevel.wait_readable(self.channel)
            data = self.channel.recv(_ANSWER.size)
        except ConnectionError:
            return None
        self.used, self.closes = trio.current_time(), True
        return FileIdentity(*_ANSWER.unpack(data)) if data else None

    def has_closed(self) -> bool:
        """Whether it is done with what it was asked last.  Raises ConnectionError."""
        if self.closes:
            with contextlib.suppress(BlockingIOError):
                self.channel.recv(_ANSWER.size)
                self.closes = False
        return not self.closes

    def is_idle(self) -> bool:
        """Whether nobody has needed it for a while."""
        with contextlib.suppress(ConnectionError):
            return self.has_closed() and trio.current_time() - self.used > IDLE_SECONDS
        return True


@dataclass(slots=True)
class _User:
    turn: trio.Lock = field(default_factory=trio.Lock)
    looker: _Looker | None = None

    def end(self) -> None:
        """It ends, when it can."""
        if self.looker is not None:
            self.looker.channel.close()
            self.looker = None


class Lookers:
    """All of them, by user."""

    def __init__(self, starter: Starter) -> None:
        self._starter = starter
        self._users: dict[int, _User] = {}
        self._needed = trio.Event()

    async def run(self) -> None:
        """End those that nobody needs; forever, and in the end all."""
        try:
            while True:
                await self._needed.wait()
                await trio.sleep(IDLE_SECONDS)
                for uid, user in list(self._users.items()):
                    if not user.turn.locked() and (user.looker is None or user.looker.is_idle()):
                        del self._users[uid]
                        user.end()
                if not self._users:
                    self._needed = trio.Event()
        finally:
            for user in self._users.values():
                user.end()

    @staticmethod
    def first_now(sock: socket.socket, uid: int) -> FileIdentity | None:
        """As `first`, at once; None if it takes a looker.  Raises OSError."""
        if uid not in (0, os.geteuid()):
            return None
        identity, fds = _first(sock)
        for fd in fds:
            os.close(fd)
        return identity

    async def first(self, sock: socket.socket, uid: int) -> FileIdentity:
        """Which file the first descriptor of the message that waits is of.

        Waits for the looker of that user, for ever if need be.  Raises OSError.
        """
        identity = self.first_now(sock, uid)
        if identity is not None:
            return identity
        user = self._users.setdefault(uid, _User())
        self._needed.set()
        async with user.turn:
            while True:
                if user.looker is None:
                    user.looker = await self._start(uid)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._tell_of, uid, user.looker)
                    identity_or_none = await user.looker.ask(sock)
                    nursery.cancel_scope.cancel()
                if identity_or_none is not None:
                    return identity_or_none
                user.end()

    async def _start(self, uid: int) -> _Looker:
        while True:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.setblocking(False)
            with theirs:
                try:
                    pid, pidfd = await self._starter.start(uid, theirs, Kind.LOOKER)
                except OSError as error:
                    ours.close()
                    log.error("no process for connections of user %d: %s", uid, error.strerror)
                    await trio.sleep(AGAIN_SECONDS)
                    continue
            os.close(pidfd)
            return _Looker(pid, ours, trio.current_time())

    @staticmethod
    async def _tell_of(uid: int, looker: _Looker) -> None:
        await trio.sleep(SILENT_SECONDS)
        while processes.state(looker.pid) != "D":  # it may have to wait for a processor
            await trio.sleep(SILENT_SECONDS)
        log.warning(
            "user %d makes no connections: process %d hangs in the kernel (%s), where it closes "
            "a file that came with one",
            uid,
            looker.pid,
            processes.read_proc(looker.pid, "wchan") or "?",
        )


def main(uid: int, channel: socket.socket) -> NoReturn:
    """Be a looker; called in a process of its own."""
    try:
        name = str(uid)
        with contextlib.suppress(KeyError):
            name = pwd.getpwuid(uid).pw_name
        setproctitle(f"msharefsd: looker {name}")
        priority.give_back()
        privileges.drop(())
        while True:
            data, connections, _, _ = socket.recv_fds(channel, 1, 1)
            if not data or not connections:
                break
            with socket.socket(fileno=connections[0]) as sock:
                identity, fds = _NOTHING, list[int]()
                with contextlib.suppress(OSError):
                    identity, fds = _first(sock)
                channel.send(_ANSWER.pack(*_fields(identity)))
                for fd in fds:
                    with contextlib.suppress(OSError):
                        os.close(fd)
            channel.send(b"x")
    finally:
        os._exit(0)


def _fields(identity: FileIdentity) -> tuple[int, int, int, int]:
    return identity.major, identity.minor, identity.inode, identity.mode
