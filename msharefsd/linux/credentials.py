"""Who connected to a unix socket."""

from __future__ import annotations

import socket
import struct
from typing import Final, Protocol

_UCRED: Final = struct.Struct("=iII")


class HasOptions(Protocol):
    """A socket, trio's or the standard library's."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes:
        """getsockopt(2)."""


def credentials(sock: HasOptions) -> tuple[int, int, int]:
    """Process, user and group of who connected (SO_PEERCRED, unix(7))."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(data)
    return pid, uid, gid
