"""The starter: a small process that forks pagers, made before anything else is.

A pager has to be forked from a process with one thread that has neither /dev/fuse nor any
client's descriptor, and that has still the rights which the front lets go of.  So the front
forks the starter when it has read its settings and nothing more.  All that a pager imports is
imported by then, and its memory is shared with the front's and among pagers (gc.freeze()
keeps the garbage collector from writing to it).

It is told what is wanted for which user and given one end of a channel, and answers with the
number of the process and its pidfd.  It ends when the front does.
"""

from __future__ import annotations

import array
import contextlib
import gc
import logging
import os
import signal
import socket
import struct
from collections.abc import Callable, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Final, NoReturn

import trio
from setproctitle import setproctitle

from msharefsd.errors import StartError
from msharefsd.linux import cgroups

log = logging.getLogger(__name__)

_REQUEST: Final = struct.Struct("=II")
_REPLY: Final = struct.Struct("=i")
_FIRST: Final = 3
_MOST: Final = 1 << 20
_COLLECT: Final = (700, 10, 10_000)
"""When garbage is collected (gc.set_threshold()): all of it hardly ever, since that takes 50 ms
and more with thousands of sharers, and they wait.  What comes and goes in such numbers is to
refer to itself no more when it goes, and is freed without."""

Main = Callable[[int, socket.socket], NoReturn]
"""What such a process does: its user, and its end of the channel."""


class Kind(IntEnum):
    """What can be started."""

    PAGER = 0
    EXPORTER = 1


class Starter:
    """The front's side."""

    def __init__(self, mains: Mapping[Kind, Main], groups: Path | None = None) -> None:
        """Fork it, from a process with one thread.  `mains` is what its children run.

        `groups`: the control group below which each pager has one of its own.
        """
        self._groups = groups
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_COLLECT)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                ours.close()
                _run(theirs, mains, groups)
            finally:
                os._exit(1)
        theirs.close()
        ours.setblocking(False)
        self._sock = ours
        self._turn = trio.Lock()

    async def start(
        self, uid: int, channel: socket.socket, kind: Kind = Kind.PAGER
    ) -> tuple[int, int]:
        """Start a process for a user with that end of a channel: its pid, and a pidfd.

        `channel` stays the caller's.  Raises OSError when no process can be had, StartError
        when none ever will.
        """
        async with self._turn:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [channel.fileno()]))]
            try:
                self._sock.sendmsg([_REQUEST.pack(kind, uid)], rights)
                await trio.lowlevel.wait_readable(self._sock)
                data, fds, _, _ = socket.recv_fds(self._sock, _REPLY.size, 1)
            except ConnectionError as error:
                raise _ended() from error
        if len(data) != _REPLY.size:
            raise _ended()
        (pid,) = _REPLY.unpack(data)
        if pid < 0 or not fds:
            raise OSError(-pid, os.strerror(-pid))
        return pid, fds[0]

    def ended(self, uid: int) -> None:
        """A user's pager is gone, and so may its group be."""
        if self._groups is not None:
            cgroups.remove(self._groups, _group_of(uid))

    def close(self) -> None:
        """It ends; pagers end with the front's own channels."""
        self._sock.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def _ended() -> StartError:
    return StartError("the process that starts pagers has ended")


def _group_of(uid: int) -> str:
    return f"pager-{uid}"


def _run(front: socket.socket, mains: Mapping[Kind, Main], groups: Path | None) -> None:
    """The starter's life."""
    # What ends the front from a terminal is not for us: we end when it does.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, _reap)
    os.closerange(_FIRST, front.fileno())
    os.closerange(front.fileno() + 1, _MOST)
    setproctitle("msharefsd: starter")
    while True:
        data, fds, _, _ = socket.recv_fds(front, _REQUEST.size, 1)
        if len(data) != _REQUEST.size or len(fds) != 1:
            return
        kind, uid = _REQUEST.unpack(data)
        channel = socket.socket(fileno=fds[0])
        # One that ends at once is there until we have its pidfd.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        try:
            pid = os.fork()
        except OSError as error:
            front.send(_REPLY.pack(-(error.errno or 1)))
        else:
            if pid == 0:
                front.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
                if groups is not None and kind == Kind.PAGER:
                    _enter(groups, uid)
                mains[Kind(kind)](uid, channel)
            _answer(front, pid)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        channel.close()


def _enter(groups: Path, uid: int) -> None:
    try:
        cgroups.enter(groups, _group_of(uid))
    except OSError as error:
        log.warning("no control group for the pager of user %d: %s", uid, error.strerror)


def _reap(_number: int, _frame: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def _answer(front: socket.socket, pid: int) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:  # no room
        front.send(_REPLY.pack(-(error.errno or 1)))
        return
    socket.send_fds(front, [_REPLY.pack(pid)], [pidfd])
    os.close(pidfd)
