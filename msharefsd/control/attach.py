"""Attaching: proofs, new regions, donors, and going on after a pager's death."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from functools import partial
from typing import Final

from msharefsd.barriers import barrier
from msharefsd.control import wire
from msharefsd.control.guards import on_the_way
from msharefsd.control.orphans import is_gone
from msharefsd.control.peer import Peer, owner_of
from msharefsd.control.sharing import Sharing
from msharefsd.control.wire import BackingKind, Reply, ReplyFlag, Request, RequestFlag
from msharefsd.errors import Refused
from msharefsd.linux import processes, syscalls, uffd
from msharefsd.memory import hugetlb
from msharefsd.memory.backing import Backing
from msharefsd.memory.hugetlb import HugetlbBacking
from msharefsd.paging.lanes import Far
from msharefsd.paging.pages import pages_of
from msharefsd.paging.watching import is_untrusted
from msharefsd.paging.window import window_of
from msharefsd.region.objects import Object
from msharefsd.region.region import Region, Sharer, State, writes

_KINDS: Final = {
    BackingKind.BACKING_DEFAULT: "",
    BackingKind.BACKING_SHM: "shm",
    BackingKind.BACKING_HUGETLB: "hugetlb",
}


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


def _zeros(region: Region) -> Object:
    """Memory for all of a new region that its creator wanted, in whole pages."""
    length = min(region.length or region.size, region.size)
    protection = syscalls.PROT_READ | syscalls.PROT_WRITE
    return Object(0, -(-length // region.page) * region.page, protection, private=False)


def _code(error: OSError) -> int:
    """What is said of a userfaultfd that cannot be taken."""
    return error.errno if error.errno in (errno.EBUSY, errno.EAGAIN) else errno.EINVAL


class Attaching:
    """The calls by which a connection becomes a sharer."""

    def __init__(self, state: Sharing) -> None:
        self._state = state
        self._control = state.control
        self._peer = state.peer

    # -- proofs --

    def _proven(self, proof: int) -> tuple[Region, bool]:
        """The region that a descriptor gives a right to read, and whether to write it too.

        A mapping needs a descriptor that may be read, whatever else it may (mmap(2)).
        """
        flags = fcntl.fcntl(proof, fcntl.F_GETFL)
        identity = syscalls.identify(proof)
        if flags & os.O_PATH or not stat.S_ISREG(identity.mode):
            # O_PATH takes no permission to open and so proves none.
            raise Refused(errno.EPERM, "open the region's file, and pass that descriptor")
        if flags & os.O_ACCMODE == os.O_WRONLY:
            raise Refused(errno.EACCES, "the descriptor is not open for reading")
        region = self._control.region_of(identity)
        if region is None and self._control.is_of_region(identity):
            raise Refused(errno.ENOENT, "the region is gone")
        if region is None:
            raise Refused(errno.EPERM, "the descriptor is of no region on this mount")
        begun = self._state.region
        if begun is None:
            # Nobody knew it when the connection was looked at: one that was about to go, and
            # that another connection has had us learn of again.
            begun = self._state.region = region
        if begun is not region and begun.id == region.id:
            # It ended since, and the front, which had not heard of that, sent somebody else.
            raise Refused(errno.ENOENT, "the region is gone")
        if region is not begun:
            raise Refused(errno.EINVAL, "one connection, one region: this one began with another")
        if region.state is State.FILE and not region.linked:
            if self._control.regions.is_going(region.id):
                # As if there were no daemon: the library begins anew, by the name.
                raise Refused(errno.ENOTCONN, "its name is being taken away: try again")
            raise Refused(errno.ENOENT, "the region is gone")
        return region, writes(flags)

    # -- ATTACH --

    async def attach(self, request: Request, fds: list[int]) -> tuple[Reply, int | None]:
        """Make the peer a sharer; takes the userfaultfd out of `fds`."""
        if self._state.sharer is not None:
            raise Refused(errno.EINVAL, "this connection has attached a region already")
        if len(fds) != 2:
            raise Refused(errno.EINVAL, "ATTACH takes a region's file and a userfaultfd")
        region, may_write = self._proven(fds[0])
        writable = writes(request.oflags)
        if writable and not may_write:
            raise Refused(errno.EACCES, "the descriptor is not open for writing")
        number = self._control.regions.new_number()
        far = await self._adopt_far(fds, number)
        try:
            # Who has no userfaultfd makes nothing, and nobody waits for who is in line.
            if far is not None and (far.in_line or region.state is State.FILE):
                await self._greeted(far)
            answer = await self._attach(region, request, fds, far, number, may_write=may_write)
            await self._greeted(far)
        except BaseException as error:
            if far is not None:
                if isinstance(error, Refused):
                    self._state.detach()
                self._control.guards.drop(number)
                far.close()
            raise
        return answer

    async def _attach(
        self,
        region: Region,
        request: Request,
        fds: list[int],
        far: Far | None,
        number: int,
        *,
        may_write: bool,
    ) -> tuple[Reply, int | None]:
        """The proof is given; the userfaultfd is in `fds`, or it is `far`."""
        regions, writable = self._control.regions, writes(request.oflags)
        created = self._supersede(region, request)
        while region.state is State.BUILDING:
            await region.settled.wait()
        regions.limits.account(self._peer.uid).check_sharers()

        flags = wire.NO_FLAGS
        if region.state is State.FILE:
            self._check_create(region, request, may_write=may_write)
            if request.oflags & os.O_EXCL and RequestFlag.REPEATED in request.flags and not created:
                raise Refused(errno.EEXIST, "somebody else created it first")
            flags = await self._create(region, request, fds, made_file=created)
        else:
            _check_attach(region, request, may_exist=created)
            self._adopt(fds)
            if created:
                flags |= ReplyFlag.CREATED
        # A donor has a descriptor to write with, until it is done.
        if ReplyFlag.DONATE not in flags and is_untrusted(
            region, self._peer.uid, writable=writable
        ):
            await self._watch(region)
        sharer = regions.attach(
            region,
            self._peer.pid,
            self._peer.uid,
            fds[1] if far is None else -1,
            writable=writable,
            ended=self._peer.has_ended,
            pidfd=self._peer.pidfd,
            uffd_number=request.userfaultfd,
            started=processes.started(self._peer.pid) if self._peer.pid else 0,
            number=number,
        )
        if far is None:
            fds.pop(1)
        else:
            window_of(sharer).far, far.sharer = far, sharer
        self._control.metrics.attaches.inc()
        self._state.join(sharer)
        backing = await self._keep_guarded(sharer)
        if pages_of(region).armed or pages_of(region).looked_at:
            flags |= ReplyFlag.PROTECTED
        # A donor of a read-only region writes its memory into it and hands the
        # descriptor back for a read-only one at COMMIT.
        fd = backing.descriptor(writable=writable or ReplyFlag.DONATE in flags)
        reply = Reply(
            request.op,
            flags=flags,
            start=region.start,
            size=region.size,
            details=wire.DETAILS.pack(region.length, region.identity),
        )
        return reply, fd

    async def _keep_guarded(self, sharer: Sharer) -> Backing:
        """Before it is told of its memory, which it is given only then."""
        await self._control.guards.keep(sharer)
        if sharer.region.backing is None:
            raise Refused(errno.ENOENT, "the region is gone")
        return sharer.region.backing

    async def _watch(self, region: Region) -> None:
        """Who is about to have the memory's descriptor must change nothing by it."""
        await self._control.pages.watching.begin(region)
        if region.backing is None or region.state is State.GONE:
            raise Refused(errno.ENOENT, "the region is gone")

    def _made_file(self, region: Region) -> bool:
        """Whether the peer has made the region's file, which it says.

        Its number alone does not tell: it may have been another process's.
        """
        peer = self._peer
        return region.creator != 0 and region.creator == peer.pid and peer.uid in (0, region.uid)

    def _supersede(self, region: Region, request: Request) -> bool:
        """Undo what the peer's ATTACH did in a pager that died before it could answer.

        Returns whether the peer made the region, which it says it does once more.
        """
        if RequestFlag.REPEATED not in request.flags:
            return False
        orphan = self._control.orphans.find(region, self._peer)
        if orphan is not None:
            region.made_file = False  # the name is needed yet
            self._control.orphans.end(orphan)
        return self._made_file(region) and region.linked and not region.sharers

    def _check_create(self, region: Region, request: Request, *, may_write: bool) -> None:
        """Raise Refused unless the peer may give a name that has no range its range."""
        create = request.oflags & os.O_CREAT and RequestFlag.AS_IT_LIES not in request.flags
        if not region.linked or not create:
            raise Refused(errno.ENOENT, "the name has no range yet: create it with O_CREAT")
        if not may_write and self._peer.uid not in (0, region.uid):
            # Whoever may only read somebody's empty file does not decide what it is.
            raise Refused(errno.EACCES, "only who may write the file gives it a range")

    async def _create(
        self, region: Region, request: Request, fds: list[int], *, made_file: bool
    ) -> ReplyFlag:
        """Give the region its range; what the reply has to say about that."""
        regions = self._control.regions
        says = RequestFlag.MADE_FILE in request.flags
        made_file = made_file or (says and self._made_file(region))
        try:
            self._adopt(fds)
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
                await self._control.front.unlink(region)
                regions.unlinked(region)
                regions.reap(region)
            raise
        self._state.build(region)
        await self._control.front.established(region)
        barrier("established")
        if RequestFlag.HAS_MAPPINGS in request.flags:
            return ReplyFlag.CREATED | ReplyFlag.DONATE
        if RequestFlag.ZEROS in request.flags:
            await self._control.spaces.donate(region, _zeros(region))
        self._state.building = None
        regions.commit(region)
        return ReplyFlag.CREATED

    def _kind_of_backing(self, request: Request) -> str:
        kind = _KINDS[request.backing] or self._control.default_backing
        if kind == HugetlbBacking.kind:
            hugetlb.may_use(self._peer.uid, self._peer.groups)
        return kind

    def _adopt(self, fds: list[int]) -> None:
        """Take the userfaultfd, unless a lane has it already."""
        if len(fds) > 1:
            try:
                self._control.pages.adopt(fds[1])
            except OSError as error:
                raise Refused(errno.EINVAL, f"no fresh userfaultfd: {error.strerror}") from error

    async def _adopt_far(self, fds: list[int], number: int) -> Far | None:
        """Take the userfaultfd out of `fds`, if it is of another user than the owner.

        Before anything is waited for: our own table must not be the last that has it.
        """
        pages, guards = self._control.pages, self._control.guards
        if not pages.lanes.needs_one(self._peer.uid):
            return None
        try:
            uffd.check_kind(fds[1])
            waiting = on_the_way(fds[1])
            try:
                far = pages.adopt_far(fds[1], self._peer.uid)
            except BaseException:
                os.close(waiting)
                raise
        except OSError as error:
            raise Refused(_code(error), f"no userfaultfd: {error.strerror}") from error
        fds.pop(1)
        try:
            await guards.keep_far(number, waiting)
        except BaseException:
            guards.drop(number)
            far.close()
            raise
        return far

    @staticmethod
    async def _greeted(far: Far | None) -> None:
        """The handshake was under way meanwhile."""
        try:
            if far is not None:
                await far.greeted()
        except OSError as error:
            raise Refused(_code(error), f"no fresh userfaultfd: {error.strerror}") from error

    # -- REJOIN --

    async def rejoin(self, request: Request, fds: list[int]) -> tuple[Reply, int | None]:
        """Go on with an attachment of this process, whose connection was lost.

        Who shows the region's file has lost the backing, too, and gets it again.
        """
        if self._state.sharer is not None:
            raise Refused(errno.EINVAL, "this connection has attached a region already")
        if len(fds) != 1:
            raise Refused(errno.EINVAL, "REJOIN takes the region's backing")
        orphans = self._control.orphans
        try:
            region, may_write = self._proven(fds[0])
        except Refused as refused:
            raise Refused(errno.ESTALE, "the region is gone") from refused
        sharer = orphans.find(region, self._peer) or self._connected(region, self._peer)
        if sharer is None:
            raise Refused(errno.ESTALE, "this process is no sharer of the region any more")
        if sharer.writable and not may_write:
            raise Refused(errno.EACCES, "the descriptor is not open for writing")
        if (hand_over := self._control.joined.get(sharer)) is not None:
            await hand_over()
        else:
            await orphans.hand_over(sharer)
        sharer.pidfd, sharer.ended = self._peer.pidfd, self._peer.has_ended
        self._state.join(sharer)
        if region.state is State.BUILDING:
            self._state.build(region)
        backing = region.backing
        lost = backing is not None and syscalls.identify(fds[0]) != backing.identity
        fd = backing.descriptor(writable=sharer.writable) if backing and lost else None
        return Reply(request.op), fd

    def _connected(self, region: Region, peer: Peer) -> Sharer | None:
        """The attachment of the peer's process, if it has a connection, somewhere."""
        for sharer in self._control.joined:
            here = sharer.region is region and sharer.pid == peer.pid != 0
            if here and peer.may_go_on(sharer.uid) and not sharer.ended() and not is_gone(sharer):
                return sharer
        return None

    # -- donors --

    def need(self, size: int) -> None:
        """So many bytes are about to be donated.  Raises Refused(ENOMEM)."""
        building = self._state.building
        if building is None or building.backing is None:
            raise Refused(errno.EINVAL, "nothing is being donated")
        building.backing.check_room(size)

    async def commit(self, request: Request) -> tuple[Reply, int | None]:
        """The donor's memory is copied: here are the objects of it that have no file."""
        region, sharer = self._state.building, self._state.sharer
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
        self._state.building = None
        return self.committed(request, sharer)

    @staticmethod
    def committed(request: Request, sharer: Sharer) -> tuple[Reply, int | None]:
        """The answer to COMMIT."""
        region = sharer.region
        assert region.backing is not None
        fd = None if sharer.writable else region.backing.descriptor(writable=False)
        pages = pages_of(region)
        flags = ReplyFlag.PROTECTED if pages.armed or pages.looked_at else wire.NO_FLAGS
        return Reply(request.op, flags=flags, start=region.start, size=region.size), fd

    async def vma_file(self, request: Request, fds: list[int]) -> tuple[Reply, int | None]:
        """The memory behind a shared anonymous VMA of the caller, for SEEK_DATA.

        Looking it up takes the lock of the caller's address space, which the caller may
        hold for as long as it likes: that is done by a thread of its user's.
        """
        peer = self._peer
        if self._state.building is None:
            raise Refused(errno.EINVAL, "nothing is being donated")
        if peer.pidfd is None or not self._control.features.map_files:
            raise Refused(errno.EPERM, "the daemon may not look into /proc/PID/map_files")
        memory = await self._control.threads.run(
            peer.uid, partial(self._open_vma, request.start, request.start + request.size)
        )
        fds.append(memory)  # closed when the reply is sent
        return Reply(request.op), memory

    def _open_vma(self, start: int, end: int) -> int:
        """Open what a VMA maps.

        The caller has it mapped, so it learns nothing new.  But the connection may
        be in other hands than the process that made it: if that has executed a
        set-user-ID program since, its memory is not this peer's to see.  /proc/PID
        belongs to the process's effective user, and to root when it is not
        dumpable (proc(5)), as for ptrace(2).
        """
        peer = self._peer
        assert peer.pidfd is not None
        try:
            # O_PATH opens nothing yet: the mapping may be of any file, a hung one too.
            path = os.open(
                f"/proc/{peer.pid}/map_files/{start:x}-{end:x}", os.O_PATH | os.O_CLOEXEC
            )
        except OSError as error:
            raise Refused(errno.EPERM, f"no such mapping: {error.strerror}") from error
        try:
            identity = syscalls.identify(path)
            # The number may have been used again unless the process still lives.
            if owner_of(peer.pid) != peer.uid or processes.has_ended(peer.pidfd):
                raise Refused(errno.EPERM, "the process is not the one that connected")
            if (identity.major, identity.minor) != self._control.anonymous_device:
                raise Refused(errno.EPERM, "the mapping is not shared anonymous memory")
            return os.open(f"/proc/self/fd/{path}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(path)

    # -- userfaultfd --

    def userfaultfd(self, request: Request, fds: list[int]) -> tuple[Reply, int | None]:
        """Hand out /dev/userfaultfd, to who may have it and has proven a right to a region.

        By it a process can have a userfaultfd that holds up system calls in the middle of
        a copy, which is what vm.unprivileged_userfaultfd=0 keeps from ordinary users.
        """
        if len(fds) != 1:
            raise Refused(errno.EINVAL, "USERFAULTFD takes a region's file, or its backing")
        self._proven(fds[0])
        if not self._control.features.device or not self._control.may_have_device(self._peer):
            return Reply(request.op, flags=ReplyFlag.USER_MODE_ONLY), None
        return Reply(request.op), self._control.device()
