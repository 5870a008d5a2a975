"""The control socket: clients attach, donate and detach.

One connection attaches one region, and its end is the sharer's end.  So a client
that is killed at any point leaves nothing: the connection's task undoes what its
calls did, in one place (`_Connection.close`).

Unless it is we who end.  A client whose daemon has died connects to the next one, says
which attachment it goes on with (REJOIN), and makes its call again.  A call that must
not be done twice has a number, and the number of the last one that was done is known.

Every descriptor that arrives is hostile until `syscalls.identify` has said what it
is.  Even closing one can hang: the last close of a file on a FUSE mount waits for
that mount's daemon, so what is not ours is closed in a thread.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import logging
import math
import os
import socket
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

from msharefsd.barriers import barrier
from msharefsd.control import wire
from msharefsd.control.orphans import Orphans
from msharefsd.control.wire import BackingKind, Op, Reply, ReplyFlag, Request, RequestFlag
from msharefsd.errors import Refused
from msharefsd.linux import processes, syscalls, uffd
from msharefsd.linux.features import Capabilities
from msharefsd.linux.processes import Deaths
from msharefsd.memory import files, hugetlb
from msharefsd.memory.hugetlb import HugetlbBacking
from msharefsd.memory.kept import Files
from msharefsd.paging import protection
from msharefsd.paging.addressspace import AddressSpaces
from msharefsd.paging.pages import pages_of
from msharefsd.paging.server import PageServer
from msharefsd.region.objects import Object
from msharefsd.region.region import Region, Sharer, State, writes
from msharefsd.region.registry import Regions
from msharefsd.telemetry.metrics import Metrics
from msharefsd.telemetry.seldom import Seldom
from msharefsd.threads.disposal import Disposal
from msharefsd.threads.pool import Threads

log = logging.getLogger(__name__)

BACKLOG: Final = 4096
_SO_PEERGROUPS: Final = 59
_MOST_GROUPS: Final = 256
"""As many as Python's getsockopt() has room for."""
MOST_UNCLOSED: Final = 64
"""How many files of a user's may wait for being closed; then their calls wait too."""
UNCLOSED_SECONDS: Final = 0.05
_SO_PEERPIDFD: Final = 77
_UCRED: Final = struct.Struct("=iII")
_PROTECTIONS: Final = syscalls.PROT_READ | syscalls.PROT_WRITE | syscalls.PROT_EXEC
_MMAP_FLAGS: Final = (
    syscalls.MAP_SHARED
    | syscalls.MAP_PRIVATE
    | syscalls.MAP_FIXED
    | syscalls.MAP_ANONYMOUS
    | syscalls.MAP_NORESERVE
)
_KINDS: Final = {
    BackingKind.BACKING_DEFAULT: "",
    BackingKind.BACKING_SHM: "shm",
    BackingKind.BACKING_HUGETLB: "hugetlb",
}
_NUMBERED: Final = frozenset({Op.MMAP, Op.MUNMAP, Op.MPROTECT, Op.DISCARD, Op.COMMIT})
_LARGEST_FILE: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Peer:
    """Who made the connection."""

    pid: int
    uid: int
    gid: int
    pidfd: int | None
    """None for a process that this pid namespace does not see."""

    groups: tuple[int, ...] = ()

    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self.pidfd is not None and processes.has_ended(self.pidfd)


def _credentials(sock: trio.socket.SocketType) -> tuple[int, int, int]:
    """Process, user and group of who connected (SO_PEERCRED, unix(7))."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(data)
    return pid, uid, gid


def _peer_of(sock: trio.socket.SocketType) -> Peer:
    pid, uid, gid = _credentials(sock)
    try:
        # Linux 6.5: the process that connected, whatever has its number by now.
        pidfd = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            pidfd = None
    return Peer(pid, uid, gid, pidfd, (gid, *_groups_of(sock)))


def _groups_of(sock: trio.socket.SocketType) -> tuple[int, ...]:
    """The supplementary groups of who connected (SO_PEERGROUPS, Linux 4.13).

    None for who has more of them than can be asked for.
    """
    try:
        data = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS * 4)
    except OSError:
        return ()
    return tuple(array.array("I", data))


def _owner(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


class Control:
    """Accepts connections and serves their calls."""

    def __init__(
        self,
        regions: Regions,
        pages: PageServer,
        spaces: AddressSpaces,
        capabilities: Capabilities,
        deaths: Deaths,
        metrics: Metrics,
        region_of_inode: Callable[[int], Region | None],
        mount_device: tuple[int, int],
        disposal: Disposal,
        threads: Threads,
        mapped_files: Files,
        orphans: Orphans,
        default_backing: str,
        keeping: Callable[[], bool],
    ) -> None:
        """Serve `regions`.

        `region_of_inode` finds a region by its file's inode number on the mount
        whose device numbers are `mount_device`.  `keeping()`: whether another
        daemon comes after us.
        """
        self.mapped_files = mapped_files
        self.orphans = orphans
        self.keeping = keeping
        self.regions = regions
        self.pages = pages
        self.spaces = spaces
        self.capabilities = capabilities
        self.deaths = deaths
        self.metrics = metrics
        self.region_of_inode = region_of_inode
        self.mount_device = mount_device
        self.disposal = disposal
        self.default_backing = default_backing
        self.threads = threads
        self._device: int | None = None
        self._spare: int | None = None
        self._reserve()
        self.seldom = Seldom()
        # Anonymous shared memory and memfds lie on the same kernel-internal mount.
        probe = os.memfd_create("msharefsd", os.MFD_CLOEXEC)
        identity = syscalls.identify(probe)
        self.anonymous_device = (identity.major, identity.minor)
        os.close(probe)

    async def run(self, listener: trio.socket.SocketType) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    sock, _ = await listener.accept()
                except OSError as error:
                    if error.errno in (errno.EMFILE, errno.ENFILE):
                        await self._turn_away(listener, error.errno)
                    else:
                        log.error("cannot accept a connection: %s", error)
                        await trio.sleep(0.1)
                    continue
                nursery.start_soon(self._serve, sock)

    async def _turn_away(self, listener: trio.socket.SocketType, code: int) -> None:
        """Out of descriptors: tell the next client so, with the one kept for that.

        It would wait for nothing otherwise.  Those that are served go on.
        """
        self._reserve()
        if self._spare is None:
            await trio.sleep(0.1)
            return
        os.close(self._spare)
        self._spare = None
        try:
            # Somebody else in this process may have been faster.
            with contextlib.suppress(OSError):
                sock, _ = await listener.accept()
                with sock:
                    if self.seldom.now(code):
                        log.error("turning clients away: %s; raise LimitNOFILE", os.strerror(code))
                    await self._refuse(sock, Refused(code, "no room for a sharer"))
        finally:
            self._reserve()

    def _reserve(self) -> None:
        if self._spare is None:
            with contextlib.suppress(OSError):
                self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    async def _refuse(self, sock: trio.socket.SocketType, refused: Refused) -> None:
        code = refused.code
        self.metrics.refused.labels(errno.errorcode.get(code, str(code))).inc()
        with trio.move_on_after(1), contextlib.suppress(OSError):
            # A message that is left unread would reset the connection (unix_release_sock()
            # in the kernel), and the peer would see that instead of the reply.
            sock.shutdown(socket.SHUT_RD)
            while await sock.recv(wire.MAX_REQUEST_BYTES):
                pass
            await sock.send(Reply(0, error=code, message=refused.message).pack())

    async def _serve(self, sock: trio.socket.SocketType) -> None:
        try:
            with sock:
                account = self.regions.limits.account(_credentials(sock)[1])
                try:
                    with account.connection():
                        await self._serve_connection(sock)
                except Refused as refused:
                    await self._refuse(sock, refused)
        except* OSError as group:
            # Reset by the peer, or the like: its own affair.
            log.debug("connection ended: %s", group.exceptions)
        except* Exception:
            log.exception("a connection failed")

    async def _serve_connection(self, sock: trio.socket.SocketType) -> None:
        try:
            connection = _Connection(self, sock)
        except OSError as error:
            raise Refused(error.errno or errno.EIO, "no room for a sharer") from error
        try:
            await connection.run()
        finally:
            # If it is we who end, what it would undo is the next daemon's; unless there
            # is none.
            ending = trio.current_effective_deadline() == -math.inf
            if not (ending and self.keeping()):
                connection.close()

    def is_ours(self, identity: syscalls.FileIdentity) -> bool:
        """Whether a file is on our mount, or the backing of a region."""
        device = (identity.major, identity.minor)
        return (
            device == self.mount_device
            or self.regions.of_backing(*device, identity.inode) is not None
        )

    def device(self) -> int:
        """/dev/userfaultfd, open."""
        if self._device is None:
            self._device = os.open(uffd.DEVICE, os.O_RDWR | os.O_CLOEXEC)
        return self._device

    def close(self) -> None:
        """Release what is not a connection's."""
        if self._spare is not None:
            os.close(self._spare)
        if self._device is not None:
            os.close(self._device)


def _check_attach(region: Region, request: Request, *, may_exist: bool) -> None:
    """Raise Refused unless the request fits a region that exists already.

    `may_exist`: it is the peer itself who created it.
    """
    if region.state is State.GONE:
        raise Refused(errno.ENOENT, "the region is gone")
    if request.oflags & os.O_EXCL and not may_exist:
        raise Refused(errno.EEXIST, "somebody else created it first")
    here = (request.start, request.size) == (region.start, region.size)
    if not here and RequestFlag.AS_IT_LIES not in request.flags:
        raise Refused(
            errno.EINVAL, f"the region is {region.size} bytes at {region.start:#x}: attach that"
        )
    if request.flags & RequestFlag.HAS_MAPPINGS:
        raise Refused(errno.EINVAL, "the process has mappings in the region's range")
    if writes(request.oflags) and region.read_only:
        raise Refused(errno.EPERM, "the region was created read-only for everyone")


class _Connection:
    def __init__(self, control: Control, sock: trio.socket.SocketType) -> None:
        self._control = control
        self._sock = sock
        self._peer = _peer_of(sock)
        self._sharer: Sharer | None = None
        self._serving = trio.CancelScope()
        self._building: Region | None = None
        self._noted = False

    async def run(self) -> None:
        """Serve calls until the peer hangs up or its process ends."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            if self._peer.pidfd is not None:
                self._control.deaths.watch(self._peer.pidfd, nursery.cancel_scope.cancel)
            while await self._one_call():
                pass
            nursery.cancel_scope.cancel()

    def close(self) -> None:
        """Undo what the calls of this connection did and did not undo themselves."""
        self._detach(self._control.regions.detach)
        if self._peer.pidfd is not None:
            self._control.deaths.forget(self._peer.pidfd)
            os.close(self._peer.pidfd)

    def _detach(self, how: Callable[[Sharer], None]) -> None:
        if self._building is not None:
            self._control.regions.abandon(self._building)
            self._building = None
        sharer = self._sharer
        if sharer is None:
            return
        self._sharer = None
        self._serving.cancel()
        self._control.pages.close(sharer)
        if sharer.region.creator == self._peer.pid:
            # It knows: from now on whoever says so is another.
            with contextlib.suppress(Refused):
                self._control.regions.change(sharer.region, creator=0)
        how(sharer)

    async def _one_call(self) -> bool:
        while self._control.disposal.pending(self._peer.uid) >= MOST_UNCLOSED:
            await trio.sleep(UNCLOSED_SECONDS)
        data, ancillary, flags, _ = await self._sock.recvmsg(
            wire.MAX_REQUEST_BYTES + 1,
            socket.CMSG_SPACE(wire.MAX_FDS * 4),
            socket.MSG_CMSG_CLOEXEC,
        )
        fds = [
            fd
            for level, kind, payload in ancillary
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            for fd in array.array("i", payload[: len(payload) - len(payload) % 4])
        ]
        try:
            if not data:
                return False
            reply, out = await self._answer(data, fds, flags)
            if reply.op:
                barrier(f"reply.{Op(reply.op).name}")
            await self._send(reply, out)
        finally:
            self._close_all(fds)
        return True

    async def _answer(self, data: bytes, fds: list[int], flags: int) -> tuple[Reply, int | None]:
        op = 0
        try:
            if flags & socket.MSG_CTRUNC and len(fds) < wire.MAX_FDS:
                raise Refused(errno.EMFILE, "the daemon is out of descriptors")
            if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
                raise Refused(errno.EINVAL, "message or its descriptors too large")
            request = wire.parse_request(data)
            op = request.op
            return self._repeated(request) or await self._handle(request, fds)
        except Refused as refused:
            code = errno.errorcode.get(refused.code, str(refused.code))
            self._control.metrics.refused.labels(code).inc()
            # Anybody can have as many of these as they like.
            often = not self._control.seldom.now((self._peer.uid, code))
            level = logging.DEBUG if often else logging.INFO
            log.log(level, "process %d: %s: %s", self._peer.pid, code, refused.message)
            return Reply(op, error=refused.code, message=refused.message), None
        except Exception:
            log.exception("a call of process %d failed", self._peer.pid)
            message = "internal error: see the daemon's log"
            return Reply(op, error=errno.EIO, message=message), None

    def _close_all(self, fds: list[int]) -> None:
        for fd in fds:
            # Closing a file of our own mount asks us nothing: flush() answered
            # ENOSYS to the daemon's self-check, and the kernel never sends it again.
            # A file of another FUSE mount waits for whoever serves that.
            if self._control.is_ours(syscalls.identify(fd)):
                os.close(fd)
            else:
                self._control.disposal.close_fd(fd, self._peer.uid)

    async def _send(self, reply: Reply, fd: int | None) -> None:
        ancillary = (
            [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        )
        await self._sock.sendmsg([reply.pack()], ancillary)

    def _send_note(self) -> None:
        # See protection.py.  Never waits: it is the only message that nobody asked for.
        if not self._noted:
            self._noted = True
            with contextlib.suppress(OSError):
                os.write(self._sock.fileno(), Reply(wire.NOTE).pack())

    async def _handle(self, request: Request, fds: list[int]) -> tuple[Reply, int | None]:
        """One call; takes from `fds` what it keeps."""
        match request.op:
            case Op.ATTACH:
                return await self._attach(request, fds)
            case Op.REJOIN:
                await self._rejoin(fds)
            case Op.COMMIT:
                return await self._commit(request)
            case Op.USERFAULTFD:
                return self._userfaultfd(request)
            case Op.VMA_FILE:
                return self._vma_file(request, fds)
            case Op.NEED:
                self._need(request.size)
            case Op.READY:
                sharer = self._need_sharer()
                await protection.admit(pages_of(sharer.region), sharer)
            case Op.DETACH | Op.UNLINK:
                self._need_attached()
                regions = self._control.regions
                unlink = request.op is Op.UNLINK
                self._detach(regions.detach_and_unlink if unlink else regions.detach)
            case _:
                await self._change(request, fds)
        return Reply(request.op), None

    def _repeated(self, request: Request) -> tuple[Reply, int | None] | None:
        """The answer of a call whose first answer was lost with its daemon; else None."""
        sharer = self._sharer
        if sharer is None or request.op not in _NUMBERED:
            return None
        if not request.sequence or request.sequence != sharer.done:
            sharer.call = request.sequence
            return None
        if request.op is Op.COMMIT:
            return self._committed(request, sharer)
        return Reply(request.op), None

    async def _change(self, request: Request, fds: list[int]) -> None:
        """A call on the region's address space."""
        sharer = self._sharer
        if sharer is None or sharer.region.backing is None:
            raise Refused(errno.ENOTCONN, "this connection has attached no region")
        if self._building is not None and request.op is not Op.MMAP:
            raise Refused(errno.EINVAL, "COMMIT or hang up first")
        if not sharer.writable and self._building is None:
            raise Refused(errno.EACCES, "the region is attached read-only")
        spaces, region, (item,) = self._control.spaces, sharer.region, request.objects
        match request.op:
            case Op.MMAP:
                await self._mmap(sharer, item, fds)
            case Op.MUNMAP:
                await spaces.munmap(region, item.offset, item.length, sharer)
            case Op.MPROTECT:
                await spaces.mprotect(region, item.offset, item.length, item.prot, sharer)
            case Op.MSYNC:
                await spaces.msync(region, item.offset, item.length)
            case Op.DISCARD:
                await spaces.discard(region, item.offset, item.length, sharer)

    async def _mmap(self, sharer: Sharer, item: wire.WireObject, fds: list[int]) -> None:
        region = sharer.region
        if item.flags & ~_MMAP_FLAGS or item.prot & ~_PROTECTIONS:
            raise Refused(errno.EINVAL, "unknown flags or protection of mmap")
        kind = item.flags & (syscalls.MAP_SHARED | syscalls.MAP_PRIVATE)
        if kind not in (syscalls.MAP_SHARED, syscalls.MAP_PRIVATE):
            raise Refused(errno.EINVAL, "a mapping is MAP_SHARED or MAP_PRIVATE")
        private = kind == syscalls.MAP_PRIVATE
        fixed = bool(item.flags & syscalls.MAP_FIXED)
        new = Object(item.offset, item.length, item.prot, private)
        if item.flags & syscalls.MAP_ANONYMOUS:
            if not item.flags & syscalls.MAP_NORESERVE and region.backing is not None:
                region.backing.check_room(item.length)
            await self._control.spaces.mmap(region, new, replace=fixed, by=sharer)
            return
        if len(fds) != 1:
            raise Refused(errno.EBADF, "a mapping that is not anonymous takes a file")
        if item.file_offset % syscalls.PAGE or item.file_offset + item.length > _LARGEST_FILE:
            raise Refused(errno.EINVAL, "the file's offset is not in whole pages, or too large")
        if self._control.is_ours(syscalls.identify(fds[0])):
            raise Refused(errno.ENODEV, "a region's own files cannot be mapped in a region")
        write = bool(item.prot & syscalls.PROT_WRITE)
        may_write = files.check_mappable(fds[0], shared=not private, write=write)
        uid = self._peer.uid
        await files.check_mapping(self._control.threads, uid, fds[0])
        file = await self._control.mapped_files.new(fds.pop(), uid, may_write=may_write)
        try:
            new = Object(item.offset, item.length, item.prot, private, file, item.file_offset)
            await self._control.spaces.mmap(region, new, replace=fixed, by=sharer)
        finally:
            file.let_go()

    def _need_attached(self) -> Sharer:
        if self._sharer is None:
            raise Refused(errno.ENOTCONN, "this connection has attached no region")
        return self._sharer

    def _need_sharer(self) -> Sharer:
        sharer = self._need_attached()
        if self._building is not None:
            raise Refused(errno.EINVAL, "COMMIT or hang up first")
        return sharer

    async def _attach(self, request: Request, fds: list[int]) -> tuple[Reply, int | None]:
        regions = self._control.regions
        if self._sharer is not None:
            raise Refused(errno.EINVAL, "this connection has attached a region already")
        if len(fds) != 2:
            raise Refused(errno.EINVAL, "ATTACH takes a region's file and a userfaultfd")
        region, may_write = self._region_of(fds[0])
        writable = writes(request.oflags)
        if writable and not may_write:
            raise Refused(errno.EACCES, "the descriptor is not open for writing")
        created = self._supersede(region, request)
        while region.state is State.BUILDING:
            await region.settled.wait()
        regions.limits.account(self._peer.uid).check_sharers()

        flags = wire.NO_FLAGS
        if region.state is State.FILE:
            self._check_create(region, request, may_write=may_write)
            if request.oflags & os.O_EXCL and RequestFlag.REPEATED in request.flags and not created:
                raise Refused(errno.EEXIST, "somebody else created it first")
            flags = self._create(region, request, fds[1], made_file=created)
        else:
            _check_attach(region, request, may_exist=created)
            self._adopt(fds[1])
            if created:
                flags |= ReplyFlag.CREATED
        sharer = regions.attach(
            region,
            self._peer.pid,
            self._peer.uid,
            fds[1],
            writable=writable,
            ended=self._peer.has_ended,
            pidfd=self._peer.pidfd,
            uffd_number=request.userfaultfd,
            started=processes.started(self._peer.pid) if self._peer.pid else 0,
        )
        fds.pop(1)
        self._control.metrics.attaches.inc()
        self._join(sharer)
        assert region.backing is not None
        if pages_of(region).armed:
            flags |= ReplyFlag.PROTECTED
        # A donor of a read-only region writes its memory into it and hands the
        # descriptor back for a read-only one at COMMIT.
        fd = region.backing.descriptor(writable=writable or ReplyFlag.DONATE in flags)
        return Reply(request.op, flags=flags, start=region.start, size=region.size), fd

    def _supersede(self, region: Region, request: Request) -> bool:
        """Undo what the peer's ATTACH did in a daemon that died before it could answer.

        Returns whether the peer made the region, which it says it does once more.
        """
        if RequestFlag.REPEATED not in request.flags:
            return False
        orphan = self._control.orphans.find(region, self._peer.pid)
        if orphan is not None:
            region.made_file = False  # the name is needed yet
            self._control.orphans.end(orphan)
        return region.creator == self._peer.pid and region.linked and not region.sharers

    async def _rejoin(self, fds: list[int]) -> None:
        """Go on with an attachment of this process that another daemon had."""
        if self._sharer is not None:
            raise Refused(errno.EINVAL, "this connection has attached a region already")
        if len(fds) != 1:
            raise Refused(errno.EINVAL, "REJOIN takes the region's backing")
        orphans = self._control.orphans
        try:
            region, may_write = self._region_of(fds[0])
        except Refused as refused:
            raise Refused(errno.ESTALE, "the region is gone") from refused
        sharer = orphans.find(region, self._peer.pid)
        if sharer is None:
            raise Refused(errno.ESTALE, "this process is no sharer of the region any more")
        if sharer.writable and not may_write:
            raise Refused(errno.EACCES, "the descriptor is not open for writing")
        await orphans.hand_over(sharer)
        sharer.pidfd, sharer.ended = self._peer.pidfd, self._peer.has_ended
        self._join(sharer)
        if region.state is State.BUILDING:
            self._building = region

    def _join(self, sharer: Sharer) -> None:
        self._sharer = sharer
        self._serving = trio.CancelScope()
        self._nursery.start_soon(self._serve_faults, sharer, self._serving)
        sharer.note = self._send_note

    def _check_create(self, region: Region, request: Request, *, may_write: bool) -> None:
        """Raise Refused unless the peer may give a name that has no range its range."""
        create = request.oflags & os.O_CREAT and RequestFlag.AS_IT_LIES not in request.flags
        if not region.linked or not create:
            raise Refused(errno.ENOENT, "the name has no range yet: create it with O_CREAT")
        if not may_write and self._peer.uid not in (0, region.uid):
            # Whoever may only read somebody's empty file does not decide what it is.
            raise Refused(errno.EACCES, "only who may write the file gives it a range")

    def _create(
        self, region: Region, request: Request, uffd_fd: int, *, made_file: bool
    ) -> ReplyFlag:
        """Give the region its range; what the reply has to say about that."""
        regions = self._control.regions
        made_file = made_file or RequestFlag.MADE_FILE in request.flags
        try:
            self._adopt(uffd_fd)
            regions.establish(
                region,
                request.start,
                request.size,
                kind=self._kind_of_backing(request),
                read_only=not writes(request.oflags),
                made_file=made_file,
            )
        except Refused:
            if made_file:
                regions.unlink(region)
            raise
        if RequestFlag.HAS_MAPPINGS in request.flags:
            self._building = region
            return ReplyFlag.CREATED | ReplyFlag.DONATE
        regions.commit(region)
        return ReplyFlag.CREATED

    def _kind_of_backing(self, request: Request) -> str:
        kind = _KINDS[request.backing] or self._control.default_backing
        if kind == HugetlbBacking.kind:
            hugetlb.may_use(self._peer.uid, self._peer.groups)
        return kind

    def _need(self, size: int) -> None:
        if self._building is None or self._building.backing is None:
            raise Refused(errno.EINVAL, "nothing is being donated")
        self._building.backing.check_room(size)

    async def _serve_faults(self, sharer: Sharer, scope: trio.CancelScope) -> None:
        with scope:
            await self._control.pages.serve(sharer)

    def _region_of(self, proof: int) -> tuple[Region, bool]:
        """The region that a descriptor gives a right to, and whether to write it."""
        flags = fcntl.fcntl(proof, fcntl.F_GETFL)
        identity = syscalls.identify(proof)
        if flags & os.O_PATH or not stat.S_ISREG(identity.mode):
            # O_PATH takes no permission to open and so proves none.
            raise Refused(errno.EPERM, "open the region's file, and pass that descriptor")
        if (identity.major, identity.minor) == self._control.mount_device:
            region = self._control.region_of_inode(identity.inode)
        else:
            region = self._control.regions.of_backing(
                identity.major, identity.minor, identity.inode
            )
        if region is None:
            raise Refused(errno.EPERM, "the descriptor is of no region on this mount")
        return region, writes(flags)

    def _adopt(self, fd: int) -> None:
        try:
            self._control.pages.adopt(fd)
        except OSError as error:
            raise Refused(errno.EINVAL, f"no fresh userfaultfd: {error.strerror}") from error

    async def _commit(self, request: Request) -> tuple[Reply, int | None]:
        """The donor's memory is copied: here are the objects of it that have no file."""
        region, sharer = self._building, self._sharer
        if region is None or sharer is None:
            raise Refused(errno.EINVAL, "nothing to commit")
        for item in request.objects:
            if item.flags not in (syscalls.MAP_SHARED, syscalls.MAP_PRIVATE):
                raise Refused(errno.EINVAL, "an object is MAP_SHARED or MAP_PRIVATE")
            private = item.flags == syscalls.MAP_PRIVATE
            await self._control.spaces.donate(
                region, Object(item.offset, item.length, item.prot, private)
            )
        await self._control.spaces.hide_donated(region)
        self._control.pages.check_memory(region)
        self._control.regions.commit(region, sharer)
        self._building = None
        return self._committed(request, sharer)

    @staticmethod
    def _committed(request: Request, sharer: Sharer) -> tuple[Reply, int | None]:
        region = sharer.region
        assert region.backing is not None
        fd = None if sharer.writable else region.backing.descriptor(writable=False)
        flags = ReplyFlag.PROTECTED if pages_of(region).armed else wire.NO_FLAGS
        return Reply(request.op, flags=flags, start=region.start, size=region.size), fd

    def _userfaultfd(self, request: Request) -> tuple[Reply, int | None]:
        if not self._control.capabilities.device:
            return Reply(request.op, flags=ReplyFlag.USER_MODE_ONLY), None
        return Reply(request.op), self._control.device()

    def _vma_file(self, request: Request, fds: list[int]) -> tuple[Reply, int | None]:
        """The memory behind a shared anonymous VMA of the caller, for SEEK_DATA.

        The caller has it mapped, so it learns nothing new.  But the connection may
        be in other hands than the process that made it: if that has executed a
        set-user-ID program since, its memory is not this peer's to see.  /proc/PID
        belongs to the process's effective user, and to root when it is not
        dumpable (proc(5)), as for ptrace(2).
        """
        peer = self._peer
        if peer.pidfd is None or not self._control.capabilities.map_files:
            raise Refused(errno.EPERM, "the daemon may not look into /proc/PID/map_files")
        entry = f"/proc/{peer.pid}/map_files/{request.start:x}-{request.start + request.size:x}"
        try:
            # O_PATH opens nothing yet: the mapping may be of any file, a hung one too.
            path = os.open(entry, os.O_PATH | os.O_CLOEXEC)
        except OSError as error:
            raise Refused(errno.EPERM, f"no such mapping: {error.strerror}") from error
        try:
            identity = syscalls.identify(path)
            # The number may have been used again unless the process still lives.
            if _owner(peer.pid) != peer.uid or processes.has_ended(peer.pidfd):
                raise Refused(errno.EPERM, "the process is not the one that connected")
            if (identity.major, identity.minor) != self._control.anonymous_device:
                raise Refused(errno.EPERM, "the mapping is not shared anonymous memory")
            memory = os.open(f"/proc/self/fd/{path}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(path)
        fds.append(memory)  # closed when the reply is sent
        return Reply(request.op), memory
