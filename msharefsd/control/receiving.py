"""Receiving from who means harm.

A message may bring descriptors, as many as SCM_MAX_FD, and the last close of one may take as
long as its sender likes: a socket that lingers (SO_LINGER), a file whose server does not
answer, a userfaultfd whose address space is locked.  A descriptor that is not received, for
want of room or because the connection is closed with a message in it, is closed by the kernel
in the thread that does that.  So every receive takes all that can come, a connection is read
empty in the same way before it is closed, and all that is not ours is closed by a thread of
its sender's user (threads/disposal.py).
"""

from __future__ import annotations

import array
import contextlib
import socket
from collections.abc import Callable
from typing import Final

from msharefsd.threads.breath import Breath

SCM_MAX_FD: Final = 253
"""The most descriptors of one message (unix(7), include/net/scm.h)."""
_CREDENTIALS: Final = 12  # struct ucred
ROOM: Final = socket.CMSG_SPACE(SCM_MAX_FD * 4) + socket.CMSG_SPACE(_CREDENTIALS)


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


async def drain(sock: socket.socket, dispose: Callable[[list[int]], None]) -> None:
    """Read a connection empty, and let nothing more in, before it is closed.

    After SHUT_RD whoever sends has EPIPE (unix_dgram_sendmsg(), net/unix/af_unix.c), so what
    is there is all there will ever be.  The end reads as an empty message does; but with
    SO_PASSCRED each message says whose it is, and the end does not.
    """
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        sock.shutdown(socket.SHUT_RD)
        breath = Breath()
        while True:
            _, fds, _, is_message = _receive(sock, 1)
            dispose(fds)
            if not is_message:
                return
            await breath.take()
