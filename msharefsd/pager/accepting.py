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
from msharefsd.control.receiving import CREDENTIALS_ROOM, drain, has_descriptors
from msharefsd.errors import Refused
from msharefsd.linux import syscalls
from msharefsd.linux.credentials import credentials
from msharefsd.linux.syscalls import FileIdentity
from msharefsd.region.region import Region
from msharefsd.telemetry.seldom import Seldom
from msharefsd.threads.breath import Breath
from msharefsd.threads.disposal import Disposal

log = logging.getLogger(__name__)

AGAIN_SECONDS: Final = 0.1
_ROOM: Final = CREDENTIALS_ROOM + socket.CMSG_LEN(4)
"""For who has sent a message, and one descriptor."""
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
        breath = Breath()
        with listener:
            async with trio.open_nursery() as nursery:
                while True:
                    try:
                        sock, _ = listener.accept()
                    except BlockingIOError:
                        await trio.lowlevel.wait_readable(listener)
                        continue
                    except OSError as error:
                        if self._seldom.now(error.errno):
                            log.error("cannot accept a connection: %s", error.strerror)
                        await trio.sleep(AGAIN_SECONDS)
                        continue
                    sock.setblocking(False)
                    await self._accepted(nursery, sock)
                    await breath.take()

    async def _accepted(self, nursery: trio.Nursery, sock: socket.socket) -> None:
        """Who has too many waits in line until the one that is too many has been told."""
        counted = contextlib.ExitStack()
        ours = trio.Event()
        ours.set()
        try:
            account = self.control.regions.limits.account(credentials(sock)[1])
            counted.enter_context(account.connection())
        except Refused as refused:
            await self.serve(sock, None, refused, ours)
            return
        self._show(1)
        counted.callback(self._show, -1)
        nursery.start_soon(self._counted, sock, counted, ours)

    def _show(self, by: int) -> None:
        board = self.control.regions.board
        if board is not None:
            board.connected(by)

    async def _counted(
        self, sock: socket.socket, counted: contextlib.ExitStack, ours: trio.Event
    ) -> None:
        with counted:
            await self.look(sock, ours)

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
            carries = await self._first_message(sock)
            if carries is None:  # it has hung up, and there was nothing in it
                await ours.wait()
                sock.close()
                return
            region = None
            if carries:
                identity = self._file_of(sock)
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

    async def _first_message(self, sock: socket.socket) -> bool | None:
        """Whether it comes with descriptors; None if there is none."""
        while True:
            while self.control.unclosed(self._uid) >= MOST_UNCLOSED:
                await trio.sleep(UNCLOSED_SECONDS)
            with contextlib.suppress(BlockingIOError):
                return has_descriptors(sock)
            await trio.lowlevel.wait_readable(sock)

    def _file_of(self, sock: socket.socket) -> FileIdentity:
        """Which file the first descriptor of the message that waits is of.  Raises OSError."""
        with contextlib.suppress(ConnectionResetError):  # what came before it is there
            sock.recv(0, _LOOK)
        fds = [
            fd
            for level, kind, payload in sock.recvmsg(1, _ROOM, _LOOK)[1]
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            for fd in array.array("i", payload[: len(payload) - len(payload) % 4])
        ]
        identity = FileIdentity(0, 0, 0, 0)
        try:
            if fds:
                identity = syscalls.identify(fds[0])
        finally:
            # A socket waits for its last close, and that is not ours: the message has it.
            if fds and (stat.S_ISSOCK(identity.mode) or self.control.is_ours(identity)):
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
