"""One client's connection: its calls, one after the other, and its end.

One connection attaches one region.  When it ends and the client with it, the connection's
task undoes what its calls did, in one place (`Connection.leave`): so a client that is
killed at any point leaves nothing.  One that has only closed its descriptors goes on to
use its memory, and is served without a connection (orphans.py).

Unless it is we who end.  A client whose pager has died connects to the next one, says
which attachment it goes on with (REJOIN), and makes its call again.  A call that must
not be done twice has a number, and the number of the last one that was done is known.

What comes with the connection is which region its first message proves a right to; somebody
has looked at that message and left it in the socket (pager/accepting.py, front/router.py).
"""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable

import trio

from msharefsd.barriers import barrier
from msharefsd.control import wire
from msharefsd.control.attach import Attaching
from msharefsd.control.calls import Calls
from msharefsd.control.contents import Contents
from msharefsd.control.control import Control
from msharefsd.control.peer import peer_of
from msharefsd.control.receiving import (
    drain,
    drain_far,
    has_descriptors,
    receive_far,
    receive_now,
)
from msharefsd.control.sharing import Sharing
from msharefsd.control.wire import Op, Reply, Request
from msharefsd.errors import Refused
from msharefsd.linux import syscalls, uffd
from msharefsd.region.region import Region

log = logging.getLogger(__name__)

MOST_UNCLOSED = 64
"""How many files of a user's may wait for being closed; then their calls wait too."""
UNCLOSED_SECONDS = 0.05
_NUMBERED = frozenset({Op.MMAP, Op.MUNMAP, Op.MPROTECT, Op.DISCARD, Op.COMMIT, Op.AWAIT})


class Connection:
    """A connection, and what it is about."""

    def __init__(self, control: Control, sock: socket.socket, region: Region | None) -> None:
        """`sock` is taken over.  Raises OSError when there is no room for a pidfd."""
        self._control = control
        self._sock = sock
        self._peer = peer_of(sock)
        self._state = Sharing(control, self._peer, region, self._send_note)
        self._attaching = Attaching(self._state)
        self._calls = Calls(self._state)
        self._contents = Contents(self._state)
        self._noted = False
        self._is_far = control.pages.lanes.needs_one(self._peer.uid)

    async def run(self) -> None:
        """Serve calls until the peer hangs up or its process ends."""
        async with trio.open_nursery() as nursery:
            self._state.nursery = nursery
            if self._peer.pidfd is not None:
                self._control.deaths.watch(self._peer.pidfd, nursery.cancel_scope.cancel)
            while await self._one_call():
                pass
            nursery.cancel_scope.cancel()
        self._state.nursery = None

    def leave(self) -> None:
        """Undo what the calls of this connection did and did not undo themselves.

        A sharer whose address space lives is a sharer still.
        """
        pidfd = self._peer.pidfd
        if pidfd is not None:
            self._control.deaths.forget(pidfd)
        sharer = self._state.leave_alone()
        self._state.leave()
        if sharer is not None:
            self._control.orphans.add(sharer, pidfd)
        elif pidfd is not None:
            os.close(pidfd)

    async def close(self) -> None:
        """Let go of it, when nobody else has it."""
        if self._is_far:
            await drain_far(self._control.pages.lanes, self._peer.uid, self._sock)
        else:
            await drain(self._sock, lambda fds: self._control.dispose(fds, self._peer.uid))
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()

    async def refuse(self, refused: Refused) -> None:
        """Read the first message, say why it is turned down, and that is all."""
        self._count(refused)
        with contextlib.suppress(OSError):
            _, fds, _ = receive_now(self._sock, wire.MAX_REQUEST_BYTES + 1)
            self._control.close_all(fds, self._peer.uid)
            await self._send(Reply(0, error=refused.code, message=refused.message), None)

    async def _receive(self) -> tuple[bytes, list[int], int]:
        while True:
            with contextlib.suppress(BlockingIOError):
                if self._is_far and has_descriptors(self._sock):
                    return await receive_far(
                        self._control.pages.lanes,
                        self._peer.uid,
                        self._sock,
                        wire.MAX_REQUEST_BYTES + 1,
                        self._passes(),
                    )
                return receive_now(self._sock, wire.MAX_REQUEST_BYTES + 1)
            await trio.lowlevel.wait_readable(self._sock)

    def _passes(self) -> Callable[[int], bool]:
        """Which descriptors of another user's process are let in: what calls take.

        Only who may write maps files, and its files may hold up what they are mapped in.
        """
        sharer, region = self._state.sharer, self._state.region
        maps = self._state.building is not None or (sharer is not None and sharer.writable)
        devices = {self._control.mount_device}
        if region is not None and region.backing is not None:
            devices.add((region.backing.identity.major, region.backing.identity.minor))

        def passes(fd: int) -> bool:
            if uffd.is_one(fd):
                return True
            identity = syscalls.identify(fd)
            device = identity.major, identity.minor
            return device in devices or (maps and stat.S_ISREG(identity.mode))

        return passes

    async def _one_call(self) -> bool:
        while self._control.unclosed(self._peer.uid) >= MOST_UNCLOSED:
            await trio.sleep(UNCLOSED_SECONDS)
        try:
            data, fds, flags = await self._receive()
        except Refused as refused:
            self._count(refused)
            await self._send(Reply(0, error=refused.code, message=refused.message), None)
            return False
        try:
            if not data:
                return False
            reply, out = await self._control.turns.work(
                self._peer.uid, self._answer, data, fds, flags
            )
            if self._state.sharer is not None:
                self._state.sharer.region.show()
            if reply.op:
                barrier(f"reply.{Op(reply.op).name}")
            await self._send(reply, out)
        finally:
            self._control.close_all(fds, self._peer.uid)
        return True

    async def _answer(self, data: bytes, fds: list[int], flags: int) -> tuple[Reply, int | None]:
        op = 0
        try:
            if flags & socket.MSG_CTRUNC:
                raise Refused(errno.EMFILE, "the daemon is out of descriptors")
            if flags & socket.MSG_TRUNC or len(fds) > wire.MAX_FDS:
                raise Refused(errno.EINVAL, "message too large, or too many descriptors")
            request = wire.parse_request(data)
            op = request.op
            return self._repeated(request) or await self._handle(request, fds)
        except Refused as refused:
            self._count(refused)
            return Reply(op, error=refused.code, message=refused.message), None
        except Exception:
            log.exception("a call of process %d failed", self._peer.pid)
            message = "internal error: see the daemon's log"
            return Reply(op, error=errno.EIO, message=message), None

    def _count(self, refused: Refused) -> None:
        code = errno.errorcode.get(refused.code, str(refused.code))
        self._control.metrics.refused.labels(code).inc()
        # Anybody can have as many of these as they like.
        often = not self._control.seldom.now((self._peer.uid, code))
        level = logging.DEBUG if often else logging.INFO
        log.log(level, "process %d: %s: %s", self._peer.pid, code, refused.message)

    async def _send(self, reply: Reply, fd: int | None) -> None:
        rights = (
            [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        )
        while True:
            with contextlib.suppress(BlockingIOError):
                self._sock.sendmsg([reply.pack()], rights, socket.MSG_NOSIGNAL)
                return
            await trio.lowlevel.wait_writable(self._sock)

    def _send_note(self) -> None:
        # See protection.py.  Never waits: it is the only message that nobody asked for.
        if not self._noted:
            self._noted = True
            with contextlib.suppress(OSError):
                self._sock.send(Reply(wire.NOTE).pack(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _repeated(self, request: Request) -> tuple[Reply, int | None] | None:
        """The answer of a call whose first answer was lost with its pager; else None."""
        sharer = self._state.sharer
        if sharer is None or request.op not in _NUMBERED:
            return None
        if not request.sequence or request.sequence != sharer.done:
            sharer.call = request.sequence
            return None
        if request.op is Op.COMMIT:
            return self._attaching.committed(request, sharer)
        return Reply(request.op), None

    async def _handle(self, request: Request, fds: list[int]) -> tuple[Reply, int | None]:
        """One call; takes from `fds` what it keeps."""
        reply = Reply(request.op)
        match request.op:
            case Op.READY:
                await self._calls.ready()
            case Op.DETACH:
                self._state.need_attached()
                await self._state.give_up()
            case Op.UNLINK:
                self._state.need_attached()
                await self._state.detach_and_unlink()
            case Op.AWAIT | Op.FILL:
                reply = await self._contents.call(request, fds)
                self._state.progress()
            case Op.MMAP | Op.MUNMAP | Op.MPROTECT | Op.MSYNC | Op.DISCARD:
                await self._calls.change(request, fds)
                self._state.progress()
            case _:
                return await self._attach(request, fds)
        return reply, None

    async def _attach(self, request: Request, fds: list[int]) -> tuple[Reply, int | None]:
        """A call by which a process becomes a sharer, or is about to."""
        match request.op:
            case Op.ATTACH:
                return await self._attaching.attach(request, fds)
            case Op.REJOIN:
                return await self._attaching.rejoin(request, fds)
            case Op.COMMIT:
                return await self._attaching.commit(request)
            case Op.USERFAULTFD:
                return self._attaching.userfaultfd(request, fds)
            case Op.VMA_FILE:
                return await self._attaching.vma_file(request, fds)
            case _:  # NEED
                self._attaching.need(request.size)
        return Reply(request.op), None
