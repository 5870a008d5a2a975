"""Receiving from who means harm.

A message may bring descriptors, as many as SCM_MAX_FD, and the last close of one may take as
long as its sender likes: a socket that lingers (SO_LINGER), a file whose server does not
answer, a userfaultfd whose address space is locked.  A descriptor that is not received, for
want of room or because the connection is closed with a message in it, is closed by the kernel
in the thread that does that.  So every receive takes all that can come, a connection is read
empty in the same way before it is closed, and all that is not ours is closed by a thread of
its sender's user (threads/disposal.py).

Of some files every close takes as long (filp_flush(), fs/open.c), the first one too.  What a
process of another user than the owner sends is therefore received in its user's lane
(paging/lanes.py), and what has no use, or might be such a file, comes as /dev/null from there.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from typing import Final

import trio

from msharefsd.errors import Refused
from msharefsd.paging.lanes import Dispose, Lanes
from msharefsd.threads.breath import Breath

SCM_MAX_FD: Final = 253
"""The most descriptors of one message (unix(7), include/net/scm.h)."""
CREDENTIALS_ROOM: Final = socket.CMSG_SPACE(12)  # struct ucred
ROOM: Final = socket.CMSG_SPACE(SCM_MAX_FD * 4) + CREDENTIALS_ROOM
AGAIN_SECONDS: Final = 0.05


def _receive(sock: socket.socket, size: int) -> tuple[bytes, list[int], int, bool]:
    data, ancillary, flags, _ = sock.recvmsg(
        size, ROOM, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
    )
    fds = [
        fd
        for level, kind, payload in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for fd in array.array("i", payload[: len(payload) - len(payload) % 4])
    ]
    return data, fds, flags, bool(ancillary)


def receive_now(sock: socket.socket, size: int) -> tuple[bytes, list[int], int]:
    """The next message of at most `size` bytes, all its descriptors, and its MSG_* flags.

    Never waits.  Raises OSError: EAGAIN when there is none.
    """
    return _receive(sock, size)[:3]


def has_descriptors(sock: socket.socket) -> bool | None:
    """Whether the message that waits has any; None at the end.  None of them is received.

    The end reads as an empty message does; but with SO_PASSCRED each message says whose it
    is, and the end does not.  Raises BlockingIOError when there is none.
    """
    while True:
        # After the peer's end the first call may say so, and what it has sent is there.
        with contextlib.suppress(ConnectionResetError):
            _, ancillary, flags, _ = sock.recvmsg(
                1, CREDENTIALS_ROOM, socket.MSG_PEEK | socket.MSG_DONTWAIT
            )
            return bool(flags & socket.MSG_CTRUNC) if ancillary else None


async def receive_far(
    lanes: Lanes, uid: int, sock: socket.socket, size: int, passes: Callable[[int], bool]
) -> tuple[bytes, list[int], int]:
    """As receive_now, through a lane, in which `passes` is called for each descriptor.

    Raises Refused when it cannot be received now.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:

        def forward(numbers: list[int], dispose: Dispose) -> int:
            with _borrowed(numbers[0]) as connection, _borrowed(numbers[1]) as gate:
                data, fds, flags = receive_now(connection, size)
                null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    socket.send_fds(gate, [data], [fd if passes(fd) else null for fd in fds])
                finally:
                    os.close(null)
                    dispose(fds)
            return flags

        try:
            with theirs:
                flags = await lanes.lend(uid, [sock.fileno(), theirs.fileno()], forward)
        except OSError as error:
            raise Refused(
                errno.EBUSY, f"what comes with the call cannot be received: {error.strerror}"
            ) from error
        data, fds, _ = receive_now(ours, size)
    return data, fds, flags


@contextlib.contextmanager
def _borrowed(number: int) -> Iterator[socket.socket]:
    sock = socket.socket(fileno=number)
    try:
        yield sock
    finally:
        sock.detach()


async def drain_far(lanes: Lanes, uid: int, sock: socket.socket) -> None:
    """As drain, in a lane, when that comes to it."""

    def empty(numbers: list[int], dispose: Dispose) -> None:
        with _borrowed(numbers[0]) as connection:
            while True:
                _, fds, _, is_message = _receive(connection, 1)
                dispose(fds)
                if not is_message:
                    return

    with contextlib.suppress(OSError):
        _let_nothing_in(sock)
        if has_descriptors(sock) is None:
            return  # there is nothing, as mostly
        while True:
            try:
                await lanes.lend(uid, [sock.fileno()], empty)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.ENOBUFS):
                    await trio.sleep(AGAIN_SECONDS)
                    continue
            return


def _let_nothing_in(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    sock.shutdown(socket.SHUT_RD)


async def drain(sock: socket.socket, dispose: Callable[[list[int]], None]) -> None:
    """Read a connection empty, and let nothing more in, before it is closed.

    After SHUT_RD whoever sends has EPIPE (unix_dgram_sendmsg(), net/unix/af_unix.c), so what
    is there is all there will ever be.  The end reads as an empty message does; but with
    SO_PASSCRED each message says whose it is, and the end does not.
    """
    with contextlib.suppress(OSError):
        _let_nothing_in(sock)
        breath = Breath()
        while True:
            _, fds, _, is_message = _receive(sock, 1)
            dispose(fds)
            if not is_message:
                return
            await breath.take()
