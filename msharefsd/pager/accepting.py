"""A user's clients connect: what each is about, and who is to serve it.

A pager accepts from its own user's control socket: another user's clients are in another
line, and no process but this one has to wake for them.  The first message of a connection
shows what it is about: the descriptor that comes with it is a region's file, or its memory.
The message stays in the socket (MSG_PEEK).  Whose region it is not is passed on by way of
the front (front/router.py), and so is who connects for another user, as a process may that
has changed its user since it looked the socket up.

To look at a descriptor is to have it, and then to close it.  Any close(2) of a file may wait
for its server (filp_flush(), fs/open.c); that is done by threads of this user's own
(threads/disposal.py), and who keeps too many of them waiting makes no connections until they
are through.
"""

from __future__ import annotations

import array
import contextlib
import logging
import math
import os
import socket
import stat
from typing import Final, Protocol

import trio

from msharefsd.control.connection import MOST_UNCLOSED, UNCLOSED_SECONDS
from msharefsd.control.connection import Connection as ClientConnection
from msharefsd.control.control import Control
from msharefsd.control.receiving import CREDENTIALS_ROOM, drain
from msharefsd.errors import Refused
from msharefsd.linux import syscalls
from msharefsd.linux.credentials import credentials
from msharefsd.linux.syscalls import FileIdentity
from msharefsd.region.region import Region
from msharefsd.telemetry.seldom import Seldom
from msharefsd.threads.disposal import Disposal

log = logging.getLogger(__name__)

AGAIN_SECONDS: Final = 0.1
_ROOM: Final = CREDENTIALS_ROOM + socket.CMSG_LEN(4)
"""For who has sent a message, and one descriptor."""
_NO_FILE: Final = FileIdentity(0, 0, 0, 0)
"""What a message shows that has no descriptor."""
_LOOK: Final = socket.MSG_PEEK | socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT


class Front(Protocol):
    """The front, as far as connections concern it: dialog.py."""

    def catch_up(self) -> None:
        """Hear what it has said until now."""

    async def forward(self, sock: socket.socket, identity: FileIdentity | None) -> None:
        """Give it a connection, with the file that it is about if we have looked.

        Returns when it has it.  Raises OSError if it has no room.
        """


class Accepting:
    """Where one user's clients come in."""

    def __init__(self, uid: int, control: Control, front: Front) -> None:
        self.control = control
        self._uid = uid
        self._front = front
        self._seldom = Seldom()

    async def accept(self, listener: socket.socket) -> None:
        """Serve who connects to a socket that does not block; forever."""
        with listener:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._next, nursery, listener)

    async def _next(self, nursery: trio.Nursery, listener: socket.socket) -> None:
        """Serve who connects next.

        It is done by who has accepted, at once; to look for another one, or to wait for one, is
        another task's.  Who has too many waits in line until the one that is too many has been
        told.
        """
        sock = await self._connected(listener)
        ours = trio.Event()
        ours.set()
        with contextlib.ExitStack() as counted:
            try:
                account = self.control.regions.limits.account(credentials(sock)[1])
                counted.enter_context(account.connection())
            except Refused as refused:
                await self.serve(sock, None, refused, ours)
                nursery.start_soon(self._next, nursery, listener)
                return
            nursery.start_soon(self._next, nursery, listener)
            self._show(1)
            counted.callback(self._show, -1)
            await self.look(sock, ours)

    async def _connected(self, listener: socket.socket) -> socket.socket:
        while True:
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                await trio.lowlevel.wait_readable(listener)
            except OSError as error:
                if self._seldom.now(error.errno):
                    log.error("cannot accept a connection: %s", error.strerror)
                await trio.sleep(AGAIN_SECONDS)
            else:
                sock.setblocking(False)
                return sock

    def _show(self, by: int) -> None:
        board = self.control.regions.board
        if board is not None:
            board.connected(by)

    # -- what it is about --

    async def look(self, sock: socket.socket, ours: trio.Event) -> None:
        """See what a connection is about, and serve it or pass it on; to its end.

        `ours` is set when nobody else has it.
        """
        try:
            if credentials(sock)[1] != self._uid:
                await self._pass_on(sock, None)
                return
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            identity = await self._first_message(sock)
            if identity is None:  # it has hung up, and there was nothing in it
                await ours.wait()
                sock.close()
                return
            region = None
            if identity is not _NO_FILE:
                self._front.catch_up()
                region = self.control.region_of(identity)
                if region is None:
                    await self._pass_on(sock, identity)
                    return
        except OSError as error:
            log.debug("connection ended: %s", error)
            await ours.wait()
            await _turn_away(sock, self.control.disposal)
            return
        except trio.Cancelled:
            sock.detach()  # we end: there may be something in it
            raise
        await self.serve(sock, region, None, ours)

    async def _first_message(self, sock: socket.socket) -> FileIdentity | None:
        """Which file its first descriptor is of, _NO_FILE without one; None if there is none.

        Raises OSError.
        """
        while True:
            while self.control.unclosed(self._uid) >= MOST_UNCLOSED:
                await trio.sleep(UNCLOSED_SECONDS)
            with contextlib.suppress(BlockingIOError):
                return self._look_at(sock)
            await trio.lowlevel.wait_readable(sock)

    def _look_at(self, sock: socket.socket) -> FileIdentity | None:
        """The same of the message that waits, of which one descriptor is received, and closed.

        The end reads as an empty message does; but with SO_PASSCRED each message says whose it
        is, and the end does not.  Raises BlockingIOError when there is none.
        """
        try:
            _, ancillary, flags, _ = sock.recvmsg(1, _ROOM, _LOOK)
        except ConnectionResetError:  # its end; what came before is there
            _, ancillary, flags, _ = sock.recvmsg(1, _ROOM, _LOOK)
        fds = [
            fd
            for level, kind, payload in ancillary
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            for fd in array.array("i", payload[: len(payload) - len(payload) % 4])
        ]
        if not fds:
            if flags & socket.MSG_CTRUNC:  # there is one, and no room for it
                return FileIdentity(0, 0, 0, 0)
            return _NO_FILE if ancillary else None
        identity = FileIdentity(0, 0, 0, 0)
        try:
            identity = syscalls.identify(fds[0])
        finally:
            # A socket waits for its last close, and that is not ours: the message has it.
            if stat.S_ISSOCK(identity.mode) or self.control.is_ours(identity):
                os.close(fds.pop(0))
            self.control.close_all(fds, self._uid)
        return identity

    async def _pass_on(self, sock: socket.socket, identity: FileIdentity | None) -> None:
        """The front has it then.  Whoever serves it reads it empty before they close it.

        So ours is the last close of a message only if they have been killed meanwhile; and who
        waits for that then is the pager of who sent it.
        """
        while True:
            try:
                await self._front.forward(sock, identity)
                break
            except ConnectionError:  # it is gone, and so are we in a moment
                sock.detach()
                return
            except OSError as error:
                if self._seldom.now(error.errno):
                    log.error("cannot pass a connection on: %s", error.strerror)
                await trio.sleep(AGAIN_SECONDS)
        sock.close()

    # -- to its end --

    async def serve(
        self,
        sock: socket.socket,
        region: Region | None,
        refused: Refused | None,
        ours: trio.Event,
    ) -> None:
        """Serve a connection, or turn it down; `ours` is set when nobody else has it."""
        try:
            try:
                connection = ClientConnection(self.control, sock, region)
            except OSError as error:
                log.error("no room for a sharer: %s", error.strerror)
                await ours.wait()
                await _turn_away(sock, self.control.disposal)
                return
            try:
                if refused is not None:
                    await connection.refuse(refused)
                else:
                    await connection.run()
            finally:
                # If it is we who end, what it would undo is the next pager's.
                if trio.current_effective_deadline() != -math.inf:
                    connection.leave()
                    with trio.CancelScope(shield=True):
                        await ours.wait()
                        await connection.close()
        except* OSError as group:
            # Reset by the peer, or the like: its own affair.
            log.debug("connection ended: %s", group.exceptions)
        except* Exception:
            log.exception("a connection failed")


async def _turn_away(sock: socket.socket, disposal: Disposal) -> None:
    await drain(sock, disposal.close_fds)
    sock.close()
