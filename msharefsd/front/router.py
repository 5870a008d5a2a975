"""Connections that are not for the pager of who made them.

Each user's clients connect to a socket of their user's own (mount/controls.py), from which
that user's pager accepts (pager/accepting.py).  What a connection is about shows a descriptor
that comes with its first message, and only a process of its sender's user looks at that: any
close(2) of a file may wait for its server.  So a pager passes on what is another's, with the
numbers of the file; the front knows whose region that is, and hands the connection to that
pager.  The message is in the socket all the while.  Nothing is proven by what a pager has
seen: who serves the connection looks for itself.

Who has no socket of their own, because there are too many users, comes to the one that is
everybody's.  The front accepts from that, and has the pager of who it is look.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
from collections.abc import Iterator
from typing import Final

import trio

from msharefsd.errors import Refused
from msharefsd.front.pagers import Pagers, leave_open
from msharefsd.link.messages import Forward
from msharefsd.linux.credentials import credentials
from msharefsd.mount.names import Name, Names
from msharefsd.region.limits import Limits
from msharefsd.telemetry.seldom import Seldom
from msharefsd.threads.breath import Breath
from msharefsd.threads.fairness import Turns

log = logging.getLogger(__name__)

AGAIN_SECONDS: Final = 0.1


class Router:
    """Hands connections to pagers."""

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
            self._pagers.forwarded = self._forwarded
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._pagers.forwarded = leave_open

    def serve(self, listener: socket.socket, uid: int | None) -> None:
        """Serve who connects to a socket that does not block, and is a user's or everybody's."""
        if uid is None:
            self._nursery.start_soon(self._accept, listener)
        else:
            self._nursery.start_soon(self._listen, uid, listener)

    async def _listen(self, uid: int, listener: socket.socket) -> None:
        with listener:
            await self._pagers.listen(uid, listener)

    async def _accept(self, listener: socket.socket) -> None:
        breath = Breath()
        with listener:
            while True:
                try:
                    sock, _ = listener.accept()
                    sock.setblocking(False)
                    self._hand_over(sock, None, look=True)
                    await breath.take()
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(listener)
                except OSError as error:
                    if self._seldom.now(error.errno):
                        log.error("cannot accept a connection: %s", error.strerror)
                    await trio.sleep(AGAIN_SECONDS)

    def _forwarded(self, sock: socket.socket, message: Forward) -> None:
        if not message.looked:
            self._hand_over(sock, None, look=True)
        elif (message.major, message.minor) == self._mount_device:
            self._hand_over(sock, self._names.of_inode(message.inode))
        else:
            file = message.major, message.minor, message.inode
            self._hand_over(sock, self._names.of_backing(*file))

    def _hand_over(self, sock: socket.socket, name: Name | None, *, look: bool = False) -> None:
        uid = credentials(sock)[1]
        over = contextlib.ExitStack()
        try:
            over.enter_context(self._limits.account(uid).connection())
        except Refused as refused:
            self._nursery.start_soon(self._turn_down, sock, uid, refused)
        else:
            self._nursery.start_soon(self._to_pager, sock, uid, name, look, over)

    async def _turn_down(self, sock: socket.socket, uid: int, refused: Refused) -> None:
        with _left_open(sock):
            await self._pagers.turn_down(sock, uid, refused, lambda: None)

    async def _to_pager(
        self,
        sock: socket.socket,
        uid: int,
        name: Name | None,
        look: bool,  # noqa: FBT001 - Nursery.start_soon() takes no names
        over: contextlib.ExitStack,
    ) -> None:
        home = uid if name is None else name.home
        with _left_open(sock):
            try:
                async with self._turns.turn(uid):
                    if self._pagers.hand_over_now(sock, home, name, over.close, look=look):
                        return
                await self._pagers.hand_over(sock, home, name, over.close, look=look)
            except Exception:
                log.exception("a connection failed")
                broken = Refused(errno.EIO, "internal error: see the daemon's log")
                await self._pagers.turn_down(sock, uid, broken, over.close)


@contextlib.contextmanager
def _left_open(sock: socket.socket) -> Iterator[None]:
    """If it is we who end, it is not closed by us: there may be something in it."""
    try:
        yield
    finally:
        if sock.fileno() >= 0:
            sock.detach()
