"""Connections to .control, and to whose pager each belongs.

A connection's first message shows what it is about: the descriptor that comes with it is a
region's file, or its memory.  The message stays in the socket (MSG_PEEK), and a process of the
sender's user says which file that descriptor is of (lookers.py): so what a client has sent is
received, used and closed by a pager alone.  Who proves no right to anything is turned down by
the pager of its own user.

All that wait are accepted at once, and looked at in turns by user (threads/fairness.py). Who
has too many connections waits in a line of their own (mount/controls.py) until the one that
is too many has been told.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
from collections.abc import Iterator
from typing import Final

import trio

from msharefsd.control.receiving import has_descriptors
from msharefsd.errors import Refused
from msharefsd.front.lookers import Lookers
from msharefsd.front.pagers import Pagers
from msharefsd.linux.credentials import credentials
from msharefsd.linux.syscalls import FileIdentity
from msharefsd.mount.names import Name, Names
from msharefsd.region.limits import Limits
from msharefsd.telemetry.seldom import Seldom
from msharefsd.threads.breath import Breath
from msharefsd.threads.fairness import Turns

log = logging.getLogger(__name__)

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
        lookers: Lookers,
    ) -> None:
        """`mount_device`: the device numbers of the mount, whose files are proofs."""
        self._names = names
        self._pagers = pagers
        self._limits = limits
        self._turns = turns
        self._mount_device = mount_device
        self._lookers = lookers
        self._seldom = Seldom()
        self._nursery: trio.Nursery

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await self._lookers.run()

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
            carries, identity = has_descriptors(sock), None
            if carries:
                identity = self._lookers.first_now(sock, uid)
            if carries is False or identity is not None:
                name = None if identity is None else self._name(identity)
                return self._pagers.hand_over_now(sock, _home(uid, name), name, over.close)
        return False

    async def _turn_down(self, sock: socket.socket, uid: int, refused: Refused) -> None:
        with _left_open(sock):
            await self._pagers.turn_down(sock, uid, refused, lambda: None)

    async def _route(self, sock: socket.socket, uid: int, over: contextlib.ExitStack) -> None:
        with _left_open(sock):
            try:
                carries = await self._carries(sock, uid)
                if carries is None:
                    sock.close()  # it has hung up, and there was nothing in it
                    over.close()
                    return
                name = await self._proven(sock, uid) if carries else None
                await self._pagers.hand_over(sock, _home(uid, name), name, over.close)
            except Exception:
                log.exception("a connection failed")
                broken = Refused(errno.EIO, "internal error: see the daemon's log")
                await self._pagers.turn_down(sock, uid, broken, over.close)

    async def _carries(self, sock: socket.socket, uid: int) -> bool | None:
        """Whether the first message comes with descriptors; None if there is none."""
        while True:
            async with self._turns.turn(uid):
                with contextlib.suppress(BlockingIOError):
                    return has_descriptors(sock)
            await trio.lowlevel.wait_readable(sock)

    async def _proven(self, sock: socket.socket, uid: int) -> Name | None:
        """The region that the first descriptor of the message is of."""
        return self._name(await self._lookers.first(sock, uid))

    def _name(self, identity: FileIdentity) -> Name | None:
        device = identity.major, identity.minor
        if device == self._mount_device:
            return self._names.of_inode(identity.inode)
        return self._names.of_backing(*device, identity.inode)


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
