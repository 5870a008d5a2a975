"""Who is at the other end of a connection."""

from __future__ import annotations

import array
import os
import socket
from dataclasses import dataclass
from typing import Final

from msharefsd.linux import processes
from msharefsd.linux.credentials import credentials

SO_PEERPIDFD: Final = 77
SO_PEERGROUPS: Final = 59
_MOST_GROUPS: Final = 256
"""As many as Python's getsockopt() has room for."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who made the connection."""

    pid: int
    """0 for a process that this pid namespace does not see."""
    uid: int
    gid: int
    pidfd: int | None
    """None for a process that this pid namespace does not see."""
    groups: tuple[int, ...] = ()

    def may_go_on(self, uid: int) -> bool:
        """Whether it may go on with what a process of its number did as that user.

        That process may have let go of its rights since.  But it may also have gained them
        since the peer connected (set-user-ID), or be another one, as the peer's has ended.
        """
        return self.uid in (0, uid) or self.uid == processes.user_of(self.pid)

    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self.pidfd is not None and processes.has_ended(self.pidfd)


def peer_of(sock: socket.socket) -> Peer:
    """Who connected.  Its pidfd is the caller's to close.  Raises OSError."""
    pid, uid, gid = credentials(sock)
    try:
        # Linux 6.5: the process that connected, whatever has its number by now.
        pidfd = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError:
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            pidfd = None
    return Peer(pid, uid, gid, pidfd, (gid, *_groups_of(sock)))


def _groups_of(sock: socket.socket) -> tuple[int, ...]:
    """The supplementary groups of who connected (SO_PEERGROUPS, Linux 4.13).

    None for who has more of them than can be asked for.
    """
    try:
        data = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, _MOST_GROUPS * 4)
    except OSError:
        return ()
    return tuple(array.array("I", data))


def owner_of(pid: int) -> int | None:
    """A process's effective user (proc(5)); None if it is gone."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None
