"""`.control`: a socket for each user, under one name.

Connections wait to be accepted in a line that belongs to the socket, first come, first
served.  With one socket for all, who connects faster than we accept would keep everybody
else out.  So who looks `.control` up finds a socket of their user's own, whose line is filled
by nobody else, and which we need not accept from while that user has too many connections.

The kernel takes the socket that is bound to the inode which the path led to
(unix_find_bsd(), net/unix/af_unix.c), whatever the name; and it asks us at each use of the
name, because we say that our answer holds for no time.  We bind in a directory of our own:
bind(2) locks the directory for writing, and who looks a name up in the mount's root has that
locked for reading until we have answered.

There may be more users than there can be sockets (subuid(5)).  Those who come late share the
one that was bound first.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
from collections.abc import Callable
from typing import Final

import trio

from msharefsd.telemetry.seldom import Seldom
from msharefsd.threads import apart

log = logging.getLogger(__name__)

CONTROL_NAME: Final = b".control"
CONTROLS_NAME: Final = b".controls"
"""Where they are bound.  Nothing is ever found in it, and it is not listed."""
CONTROL_INODE: Final = 3
CONTROLS_INODE: Final = 6
OF_USER: Final = 1 << 48
"""A user's socket has this inode number plus the user's; regions' are smaller."""
MOST: Final = 8192
"""How many sockets there are at most."""
BACKLOG: Final = 4096

Serve = Callable[[socket.socket, int | None], None]
"""Accept from that socket from now on; it is that user's, or everybody's."""


class Controls:
    """The sockets.  Until `bind()` there are none."""

    def __init__(self, group: int | None = None) -> None:
        """`group`: who may connect, if not everybody."""
        self._group = group
        self._directory = -1
        self._serve: Serve
        self._bound: dict[int, tuple[int, int, int]] = {}
        """Mode, uid and gid of those that are bound, by inode."""
        self._under_way: dict[int, trio.Event] = {}
        self._seldom = Seldom()

    async def bind(self, mountpoint: str, serve: Serve) -> None:
        """Bind the one that is for all; others when their users come.

        Our own file system has to be served meanwhile.  Raises OSError.
        """
        path = os.path.join(os.fsencode(mountpoint), CONTROLS_NAME)
        self._directory = await trio.to_thread.run_sync(
            os.open, path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, abandon_on_cancel=True
        )
        self._serve = serve
        serve(await self._new_socket(CONTROL_NAME), None)

    def close(self) -> None:
        """The sockets are whose who accept from them."""
        if self._directory >= 0:
            os.close(self._directory)

    async def of(self, uid: int) -> int | None:
        """The inode of the socket that a user is to find; None as long as there is none."""
        if CONTROL_INODE not in self._bound:
            return None
        if OF_USER + uid not in self._bound and len(self._bound) < MOST:
            await self._bind_for(uid)
        return self.known(uid)

    def known(self, uid: int) -> int | None:
        """As `of`, from what there is."""
        for inode in (OF_USER + uid, CONTROL_INODE):
            if inode in self._bound:
                return inode
        return None

    async def _bind_for(self, uid: int) -> None:
        if uid in self._under_way:
            await self._under_way[uid].wait()
            return
        done = self._under_way[uid] = trio.Event()
        try:
            self._serve(await self._new_socket(b"%d" % uid), uid)
        except OSError as error:
            if self._seldom.now(error.errno):
                log.error("no control socket for user %d: %s", uid, error.strerror)
        finally:
            del self._under_way[uid]
            done.set()

    async def _new_socket(self, name: bytes) -> socket.socket:
        listener = socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        )
        path = b"/proc/thread-self/fd/%d/%s" % (self._directory, name)
        try:
            await apart.run(lambda: listener.bind(path), [listener.fileno(), self._directory])
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener

    def mknod(self, name: bytes, mode: int, uid: int, gid: int) -> int | None:
        """A name that we bind arrives as mknod(2); the inode that it gets, or None."""
        if not stat.S_ISSOCK(mode):
            return None
        inode = CONTROL_INODE if name == CONTROL_NAME else OF_USER + int(name)
        if inode in self._bound:
            return None
        # Who may connect; what they may do is judged call by call.
        mode, gid = (0o666, gid) if self._group is None else (0o660, self._group)
        self._bound[inode] = stat.S_IFSOCK | mode, uid, gid
        return inode

    def __contains__(self, inode: int) -> bool:
        return inode in self._bound

    def attributes(self, inode: int) -> tuple[int, int, int]:
        """Mode, uid and gid of one that is bound."""
        return self._bound[inode]
