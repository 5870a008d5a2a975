"""One end of the socket between the front and a pager."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
from collections.abc import Sequence
from typing import Any, Final, Generic, TypeVar

import msgspec
import trio

from msharefsd.link.messages import MOST_BYTES

BUFFER: Final = 1 << 20
"""How much may be under way (SO_SNDBUF), as far as the system lets us."""

SHORT_SECONDS: Final = 0.01

Incoming = TypeVar("Incoming")


class ChannelError(Exception):
    """The other side has said what cannot be."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends, connected."""
    ends = socket.socketpair(
        socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    )
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    return ends


class Channel(Generic[Incoming]):
    """Sends any message, receives those of one side.

    Messages go in the order of the calls of `send`.  A message that does not go at once,
    because the other side does not read, waits in line; nobody waits for it who does not
    say so.
    """

    def __init__(self, sock: socket.socket, incoming: Any) -> None:
        """`sock` is taken over; `incoming` is the union of what may come."""
        self._sock = sock
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(incoming)
        self._encoder = msgspec.msgpack.Encoder()
        self._turn = trio.Lock()
        self._short = False
        self.closed = False

    async def send(self, message: msgspec.Struct, fds: Sequence[int] = ()) -> None:
        """Send it; returns when it is under way.  Raises OSError when nobody is there."""
        data = self._encoder.encode(message)
        if len(data) > MOST_BYTES:
            raise ChannelError(f"{type(message).__name__} of {len(data)} bytes")
        async with self._turn:
            while not self._try(data, fds):
                await trio.lowlevel.wait_writable(self._sock)
                if self._short:
                    await trio.sleep(SHORT_SECONDS)

    def send_now(self, message: msgspec.Struct, fds: Sequence[int] = ()) -> bool:
        """Send it if that is possible at once and nobody is in line.  Raises OSError."""
        if self._turn.locked():
            return False
        return self._try(self._encoder.encode(message), fds)

    def _try(self, data: bytes, fds: Sequence[int]) -> bool:
        if self.closed:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError as error:
            # Descriptors that are under way count for a user (unix(7), ETOOMANYREFS), and
            # the system may be short of memory for a moment.
            self._short = error.errno in (errno.ETOOMANYREFS, errno.ENOBUFS)
            if self._short:
                return False
            raise
        self._short = False
        return True

    async def receive(self) -> tuple[Incoming, list[int]] | None:
        """The next message and its descriptors, which are the caller's; None at the end.

        Raises ChannelError for what is none.
        """
        while True:
            got = self.receive_now()
            if got is not None:
                return got if got[1] is not None else None
            await trio.lowlevel.wait_readable(self._sock)

    def _recvmsg(self) -> tuple[bytes, list[tuple[int, int, bytes]], int, object]:
        return self._sock.recvmsg(MOST_BYTES, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)

    def receive_now(self) -> tuple[Incoming, list[int]] | tuple[None, None] | None:
        """As `receive`, without waiting: None if there is nothing, (None, None) at the end."""
        if self.closed:
            return None, None
        try:
            try:
                data, ancillary, flags, _ = self._recvmsg()
            except ConnectionResetError:
                # It ended without reading all that we sent; what it said before comes next.
                data, ancillary, flags, _ = self._recvmsg()
        except BlockingIOError:
            return None
        except ConnectionError:
            return None, None
        fds = [
            fd
            for level, kind, payload in ancillary
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            for fd in array.array("i", payload[: len(payload) - len(payload) % 4])
        ]
        if not data:
            return None, None
        try:
            if flags & socket.MSG_TRUNC:
                raise ChannelError("a message that is too long")
            # With MSG_CTRUNC there was no room for a descriptor: it comes without.
            return self._decoder.decode(data), fds
        except (msgspec.MsgspecError, ChannelError) as error:
            for fd in fds:
                os.close(fd)
            raise ChannelError(str(error)) from error

    def close(self) -> None:
        """Hang up; whoever waits here looks again and finds the end."""
        if not self.closed:
            self.closed = True
            with contextlib.suppress(RuntimeError):  # outside of trio
                trio.lowlevel.notify_closing(self._sock)
            self._sock.close()
