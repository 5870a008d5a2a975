"""What holds a region's pages.

A backing has a name, so it outlives the daemon, and mode 0600, so nobody gets a
descriptor of it but through the control socket.  Its descriptor is the capability
to attach: a child after fork shows it to prove that its parent was a sharer.

The daemon never reads or writes the pages by pointer.  A sharer with write
permission can truncate the object, and a pointer would then be SIGBUS in the
daemon; a system call just fails.

Here is what all backings have in common, and POSIX shared memory; hugetlb.py has
the other one.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import logging
import os
import re
import stat
from collections.abc import Container, Iterator
from typing import ClassVar, Final

import posix_ipc
import trio

from msharefsd import kernel, uffd
from msharefsd.barriers import barrier
from msharefsd.disposal import Disposal
from msharefsd.errors import Refused
from msharefsd.uffd import Feature, Mode

log = logging.getLogger(__name__)

SHM_DIRECTORY: Final = "/dev/shm"  # noqa: S108 - where shm_open(3) has its objects
HUGE_PAGE: Final = 2 << 20
_MOST_SQUATTERS: Final = 100
AT_ONCE: Final = 64 << 20
"""How much memory is worked on without letting anything else happen (bytes)."""


def pool_bytes() -> int:
    """How much memory there is for all regions: the size of /dev/shm."""
    memory = os.statvfs(SHM_DIRECTORY)
    return memory.f_blocks * memory.f_frsize


def _create(name: str, size: int) -> posix_ipc.SharedMemory:
    """A new object.  Anybody may make files in /dev/shm, under our names too: away with them."""
    path = SHM_DIRECTORY + name
    for _ in range(_MOST_SQUATTERS):
        try:
            return posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=size)
        except posix_ipc.ExistentialError:
            if os.lstat(path).st_uid == os.geteuid():
                raise
            log.warning("%s was somebody else's: removed", path)
            os.unlink(path)
    return posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=size)


class SparseFile(abc.ABC):
    """A file in memory of which each page is there or absent."""

    page: int = kernel.PAGE
    """Its page size: what comes, goes and is protected as a whole (bytes)."""

    def __init__(self, name: str, size: int, fd: int) -> None:
        """`fd` is taken over."""
        self.name = name
        self.size = size
        self.fd = fd

    def allocated(self) -> int:
        """Bytes of memory that it holds."""
        return os.fstat(self.fd).st_blocks * 512

    def next_data(self, offset: int) -> int:
        """The first byte at or after `offset` whose page is there (SEEK_DATA), or `size`."""
        return self._seek(offset, os.SEEK_DATA)

    def next_absent(self, offset: int) -> int:
        """The first byte at or after `offset` whose page is absent (SEEK_HOLE)."""
        return self._seek(offset, os.SEEK_HOLE)

    def _seek(self, offset: int, whence: int) -> int:
        try:
            return os.lseek(self.fd, offset, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing more, or truncated by a sharer
                return self.size
            raise

    def data(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The runs of pages in the range that are there: (start, end), bytes."""
        return _data_of(self.fd, offset, offset + length)

    def punch(self, offset: int, length: int) -> None:
        """Make pages absent: freed, and unmapped in every process."""
        _punch(self.fd, offset, length)

    @abc.abstractmethod
    def _unlink(self) -> None:
        """Remove the name, if it is still there.  Raises OSError."""

    def close(self, disposal: Disposal) -> None:
        """Remove the name and let go; the memory goes with its last mapping."""
        disposal.close_fd(self.fd)
        with contextlib.suppress(OSError):
            self._unlink()


def _data_of(fd: int, offset: int, end: int) -> Iterator[tuple[int, int]]:
    while offset < end:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
            if start >= end:
                return
            absent = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing more, or truncated by a sharer
                return
            raise
        offset = min(max(absent, start + kernel.PAGE), end)
        yield start, offset


def _punch(fd: int, offset: int, length: int) -> None:
    try:
        if os.lseek(fd, offset, os.SEEK_DATA) >= offset + length:
            return
    except OSError as error:
        if error.errno == errno.ENXIO:
            return
        raise
    kernel.punch(fd, offset, length)


def open_left(path: str, size: int) -> int:
    """Open what another daemon made.  Raises OSError if it is not there.

    EPERM if it is not ours alone.  What a sharer has truncated has its size again.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    status = os.fstat(fd)
    if (
        not stat.S_ISREG(status.st_mode)
        or status.st_uid != os.geteuid()
        or stat.S_IMODE(status.st_mode) != 0o600
    ):
        os.close(fd)
        raise OSError(errno.EPERM, "it has another owner or mode than it was given")
    if status.st_size != size:
        log.warning("%s was cut to %d bytes", path, status.st_size)
        os.ftruncate(fd, size)
    return fd


def _create_shm(name: str, size: int) -> int:
    try:
        memory = _create(name, size)
    except (OSError, posix_ipc.Error, ValueError) as error:
        code = error.errno if isinstance(error, OSError) and error.errno else errno.ENOSPC
        raise Refused(code, f"cannot create shared memory {name}: {error}") from error
    return int(memory.fd)


def _shm(name: str, size: int, *, adopt: bool) -> int:
    return open_left(SHM_DIRECTORY + name, size) if adopt else _create_shm(name, size)


def _unlink_shm(name: str) -> None:
    # Somebody with the right to it (root) may have been faster.
    with contextlib.suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_shared_memory(name)


class ShmObject(SparseFile):
    """A sparse POSIX shared memory object."""

    def __init__(self, name: str, size: int, *, adopt: bool = False) -> None:
        """Create the object `name` of `size` bytes, all of them absent.

        Raises Refused (EMFILE, ENFILE, ENOSPC, ENOMEM as the kernel says).  With
        `adopt` it is there already: see open_left().
        """
        super().__init__(name, size, _shm(name, size, adopt=adopt))

    def _unlink(self) -> None:
        _unlink_shm(self.name)


class HostMapping:
    """The daemon's own mapping of a backing.

    It stands for the page table that a kernel would keep for the region.  It has a
    userfaultfd of its own, so that pages come into it as they come into a sharer:
    whole, or not at all.  Nobody touches it by pointer; a system call that touches
    an absent page of it fails (UFFD_FEATURE_SIGBUS) and never waits for us.
    """

    def __init__(self, memory: SparseFile, feature: Feature, address: int | None = None) -> None:
        """Map all of `memory`, at `address` if that is given.

        `feature` is that of a userfaultfd on such memory.  Raises OSError: ENOMEM when
        there is no room in the address space, EEXIST when `address` is taken.
        """
        self._size = memory.size
        fixed = 0 if address is None else kernel.MAP_FIXED_NOREPLACE
        self.uffd = uffd.open_own()
        try:
            uffd.handshake(self.uffd, feature | Feature.SIGBUS)
            self.start = kernel.mmap(
                address,
                memory.size,
                kernel.PROT_READ | kernel.PROT_WRITE,
                kernel.MAP_SHARED | kernel.MAP_NORESERVE | fixed,
                memory.fd,
                0,
            )
        except OSError:
            os.close(self.uffd)
            raise
        kernel.madvise(self.start, memory.size, kernel.MADV_DONTFORK)
        uffd.register(self.uffd, self.start, memory.size, Mode.MISSING)

    def close(self) -> None:
        """Unmap it."""
        kernel.munmap(self.start, self._size)
        os.close(self.uffd)


class Backing(SparseFile):
    """A region's memory: what sharers map, the host mapping, the stash."""

    kind: ClassVar[str]
    """Its name in settings and texts."""
    charges_sharer: ClassVar[bool]
    """Whether memory is charged to the process that a page is populated through."""
    largest_chunk: int = HUGE_PAGE
    """How much is populated for one fault at the most (bytes)."""
    smallest_chunk: int = 64 << 10
    """And for a fault at a random place."""

    def __init__(
        self, name: str, size: int, fd: int, disposal: Disposal, *, adopt: bool = False
    ) -> None:
        """`fd` is taken over; `disposal` is who closes what takes its time to close.

        With `adopt` the backing is another daemon's, and may have a stash.
        """
        super().__init__(name, size, fd)
        self._disposal = disposal
        self._host: HostMapping | None = None
        self._stash: ShmObject | None = None
        self.identity = kernel.identify(fd)
        # Descriptions of their own for the sharers: they may seek and set flags.
        self._writable = self._open(os.O_RDWR)
        self._readable = self._open(os.O_RDONLY)
        if adopt:
            with contextlib.suppress(FileNotFoundError):
                self._stash = ShmObject(self.stash_name, size, adopt=True)

    @abc.abstractmethod
    def _open(self, access: int) -> int:
        """A new open file description by its name."""

    @abc.abstractmethod
    def _map_host(self) -> HostMapping:
        """Map all of it.  Raises OSError."""

    @property
    @abc.abstractmethod
    def stash_name(self) -> str:
        """The name of the stash, which is POSIX shared memory."""

    def shared_slot(self, offset: int) -> tuple[int, int] | None:  # noqa: ARG002 - not here
        """The range around `offset` that has one page table in all writers and the host.

        None if there is none.  Where something is armed the writers have left it.
        """
        return None

    def believes_present(self, offset: int) -> bool:  # noqa: ARG002 - EEXIST is plain here
        """Whether EEXIST for the page at `offset` means that it is there."""
        return True

    def check_room(self, size: int) -> None:  # noqa: ARG002 - nobody knows
        """Raise Refused(ENOMEM) if it is known that `size` bytes more cannot be had."""
        return

    def descriptor(self, *, writable: bool) -> int:
        """The descriptor to send to a sharer; it stays the backing's."""
        return self._writable if writable else self._readable

    def allocated(self) -> int:
        """Bytes of memory that the region holds."""
        return super().allocated() + (self._stash.allocated() if self._stash else 0)

    @property
    def host(self) -> HostMapping:
        """Made when it is first needed: 512 GiB are one 256th of the address space.

        Raises OSError (ENOMEM).
        """
        if self._host is None:
            self._host = self._map_host()
        return self._host

    @property
    def mapped_at(self) -> int | None:
        """Where the host mapping is, if it has been made."""
        return self._host.start if self._host else None

    @property
    def stash(self) -> ShmObject | None:
        """Where pages are that must exist and that nobody may touch, if there are any.

        It has a name as the backing has, because the daemon's death must not lose
        them.
        """
        return self._stash

    def is_stashed(self, page: int) -> bool:
        """Whether the page at offset `page` is in the stash."""
        return self._stash is not None and self._stash.next_data(page) == page

    def holds(self, page: int) -> bool:
        """Whether there is a page at offset `page`, here or in the stash."""
        return self.next_data(page) == page or self.is_stashed(page)

    def read(self, offset: int, length: int) -> bytes:
        """The contents of whole pages, wherever each is.  Raises OSError."""
        content = os.pread(self.fd, length, offset)
        if self._stash is None or self._stash.next_data(offset) >= offset + length:
            return content
        pages = bytearray(content)
        for at in range(offset, offset + len(content), self.page):
            if self.next_data(at) != at and self.is_stashed(at):
                there = slice(at - offset, at - offset + self.page)
                pages[there] = os.pread(self._stash.fd, self.page, at)
        return bytes(pages)

    def stash_pages(self, offset: int, length: int) -> None:
        """Move the pages of a range that are there to the stash.

        They must not be written meanwhile.  Copied first, then punched: at every
        moment each page is in one place or in both.

        Raises OSError: ENOSPC, ENOMEM.
        """
        if self._stash is None:
            self._stash = ShmObject(self.stash_name, self.size)
        for start, end in self.data(offset, length):
            at = start
            while at < end:
                content = os.pread(self.fd, min(end - at, HUGE_PAGE), at)
                if not content:
                    break  # truncated by a sharer
                at += os.pwrite(self._stash.fd, content, at)
        barrier("backing.stashed")
        self.punch(offset, length)

    async def runs(self, start: int, end: int) -> list[tuple[int, int]]:
        """As `data`, and other things go on meanwhile; in pieces of at most AT_ONCE."""
        if end - start <= AT_ONCE:
            return list(self.data(start, end - start))
        # Looking for the end of gigabytes of pages takes a while.
        fd = os.dup(self.fd)
        try:
            runs = await trio.to_thread.run_sync(lambda: list(_data_of(fd, start, end)))
        finally:
            os.close(fd)
        return self._in_pieces(runs)

    def _in_pieces(self, runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        step = max(AT_ONCE, self.page)
        return [
            (at, min(at + step, last)) for first, last in runs for at in range(first, last, step)
        ]

    async def discard(self, offset: int, length: int) -> None:
        """The contents of the range are gone, wherever they were.

        Freeing gigabytes takes a while: that is done in a thread.
        """
        memories = [self.fd] + ([self._stash.fd] if self._stash else [])
        if length <= AT_ONCE:
            for fd in memories:
                _punch(fd, offset, length)
            return
        mine = [os.dup(fd) for fd in memories]  # the region may go meanwhile
        try:
            for fd in mine:
                await trio.to_thread.run_sync(_punch, fd, offset, length)
        finally:
            for fd in mine:
                self._disposal.close_fd(fd)

    def release(self) -> None:
        """Remove the names now, and free the memory soon."""
        if self._host is not None:
            self._disposal.run(self._host.close)
            self._host = None
        if self._stash is not None:
            self._stash.close(self._disposal)
            self._stash = None
        for fd in (self._writable, self._readable):
            os.close(fd)
        self.close(self._disposal)


class ShmBacking(Backing):
    """POSIX shared memory: 4 KiB pages on /dev/shm, whoever touches first pays."""

    kind = "shm"
    charges_sharer = True

    def __init__(self, name: str, size: int, disposal: Disposal, *, adopt: bool = False) -> None:
        """Create it, without a page, or adopt it.  Raises as ShmObject does."""
        super().__init__(name, size, _shm(name, size, adopt=adopt), disposal, adopt=adopt)

    def _open(self, access: int) -> int:
        return os.open(SHM_DIRECTORY + self.name, access | os.O_CLOEXEC | os.O_NOFOLLOW)

    def _map_host(self) -> HostMapping:
        return HostMapping(self, Feature.MISSING_SHMEM)

    def _unlink(self) -> None:
        _unlink_shm(self.name)

    @property
    def stash_name(self) -> str:
        """The name of the stash."""
        return stash_name(self.name)


def stash_name(name: str) -> str:
    """The name of the stash of a backing that has its name in /dev/shm."""
    return f"{name}-stash"


def remove_leftovers(prefix: str, used: Container[int] = ()) -> list[str]:
    """Unlink shared memory of a daemon that died and no region's; returns the names.

    `used`: the numbers of backings that are in use.
    """
    pattern = re.compile(re.escape(prefix.lstrip("/")) + r"(\d+)(-stash)?\Z")
    matches = [pattern.match(name) for name in os.listdir(SHM_DIRECTORY)]
    names = [match[0] for match in matches if match and int(match[1]) not in used]
    for name in names:
        posix_ipc.unlink_shared_memory("/" + name)
    return names
