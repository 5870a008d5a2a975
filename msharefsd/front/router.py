"""Connections to .control, and to whose pager each belongs.

A connection's first message shows what it is about: the descriptor that comes with it is a
region's file, or its memory.  The front looks at that message and leaves it where it is
(MSG_PEEK): so the descriptors in it stay in the socket, a duplicate that is closed here is
never the last, and what a client has sent is received, used and closed by a pager alone.
Who proves no right to anything is turned down by the pager of its own user.

All that wait are accepted at once, and looked at in turns by user (threads/fairness.py). Who
has too many connections waits in a line of their own (mount/controls.py) until the one that
is too many has been told.

What is asked of a client's descriptor here is statx(2) with AT_STATX_DONT_SYNC, which file
systems answer from what they have; see linux/syscalls.py.
"""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterator
from typing import Final

import trio

from msharefsd.errors import Refused
from msharefsd.front.pagers import Pagers
from msharefsd.linux import syscalls
from msharefsd.linux.credentials import credentials
from msharefsd.mount.names import Name, Names
from msharefsd.region.limits import Limits
from msharefsd.telemetry.seldom import Seldom
from msharefsd.threads.breath import Breath
from msharefsd.threads.fairness import Turns

log = logging.getLogger(__name__)

_ROOM: Final = socket.CMSG_SPACE(12) + socket.CMSG_LEN(4)
"""For who has sent it, and one descriptor."""
AGAIN_SECONDS: Final = 0.1


class Router:
    """Accepts connections and hands each to a pager."""

    def __init__(
        self,
        names: Names,
        pagers: Pagers,
        limits: Limits,
        turns: Turns,
        mount_device: tuple[int, int],
    ) -> None:
        """`mount_device`: the device numbers of the mount, whose files are proofs."""
        self._names = names
        self._pagers = pagers
        self._limits = limits
        self._turns = turns
        self._mount_device = mount_device
        self._seldom = Seldom()
        self._nursery: trio.Nursery

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def serve(self, listener: socket.socket, uid: int | None) -> None:
        """Accept from a socket that does not block, and is a user's or everybody's."""
        self._nursery.start_soon(self._accept, listener, uid)

    async def _accept(self, listener: socket.socket, uid: int | None) -> None:
        breath = Breath()
        with listener:
            while True:
                try:
                    sock, _ = listener.accept()
                    await self._accepted(sock, is_own=uid is not None)
                    await breath.take()
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(listener)
                except OSError as error:
                    if self._seldom.now(error.errno):
                        log.error("cannot accept a connection: %s", error.strerror)
                    await trio.sleep(AGAIN_SECONDS)

    async def _accepted(self, sock: socket.socket, *, is_own: bool) -> None:
        sock.setblocking(False)
        uid = credentials(sock)[1]
        over = contextlib.ExitStack()
        try:
            over.enter_context(self._limits.account(uid).connection())
        except Refused as refused:
            if is_own:
                await self._turn_down(sock, uid, refused)
            else:
                self._nursery.start_soon(self._turn_down, sock, uid, refused)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            if not self._route_now(sock, uid, over):
                self._nursery.start_soon(self._route, sock, uid, over)

    def _route_now(self, sock: socket.socket, uid: int, over: contextlib.ExitStack) -> bool:
        """Hand a connection over whose message is there already, as it mostly is; else False.

        What fails here fails again in `_route`, which says so.
        """
        if not self._turns.may_begin(uid):
            return False
        with self._turns.counted(uid), contextlib.suppress(Exception):
            fds = _look(sock)
            if fds is not None:
                name = self._proven(fds) if fds else None
                return self._pagers.hand_over_now(sock, _home(uid, name), name, over.close)
        return False

    async def _turn_down(self, sock: socket.socket, uid: int, refused: Refused) -> None:
        with _left_open(sock):
            await self._pagers.turn_down(sock, uid, refused, lambda: None)

    async def _route(self, sock: socket.socket, uid: int, over: contextlib.ExitStack) -> None:
        with _left_open(sock):
            try:
                fds, name = await self._first(sock, uid)
                if fds is None:
                    sock.close()  # it has hung up, and there was nothing in it
                    over.close()
                    return
                await self._pagers.hand_over(sock, _home(uid, name), name, over.close)
            except Exception:
                log.exception("a connection failed")
                broken = Refused(errno.EIO, "internal error: see the daemon's log")
                await self._pagers.turn_down(sock, uid, broken, over.close)

    async def _first(self, sock: socket.socket, uid: int) -> tuple[list[int] | None, Name | None]:
        """What the first message comes with, closed by now, and which region that proves."""
        while True:
            async with self._turns.turn(uid):
                with contextlib.suppress(BlockingIOError):
                    fds = _look(sock)
                    return fds, self._proven(fds) if fds else None
            await trio.lowlevel.wait_readable(sock)

    def _proven(self, fds: list[int]) -> Name | None:
        """The region that the first descriptor of a message is of; closes them."""
        try:
            identity = syscalls.identify(fds[0])
            device = identity.major, identity.minor
            if device == self._mount_device:
                return self._names.of_inode(identity.inode)
            return self._names.of_backing(*device, identity.inode)
        finally:
            for fd in fds:
                os.close(fd)


def _home(uid: int, name: Name | None) -> int:
    """Whose pager a connection is for: the region's, or that of who proves no right to one."""
    return uid if name is None else name.home


@contextlib.contextmanager
def _left_open(sock: socket.socket) -> Iterator[None]:
    """If it is we who end, it is not closed by us: there may be something in it."""
    try:
        yield
    finally:
        if sock.fileno() >= 0:
            sock.detach()


def _look(sock: socket.socket) -> list[int] | None:
    """Duplicates of the first descriptors of the message that waits; None at the end.

    The end reads as an empty message does; but with SO_PASSCRED each message says whose it
    is, and the end does not.  After the peer's end the first call may say ECONNRESET, and
    what it has sent is there nevertheless.
    """
    while True:
        with contextlib.suppress(ConnectionResetError):
            _, ancillary, _, _ = sock.recvmsg(
                1, _ROOM, socket.MSG_PEEK | socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
            )
            break
    if not ancillary:
        return None
    return [
        fd
        for level, kind, payload in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for fd in array.array("i", payload[: len(payload) - len(payload) % 4])
    ]
